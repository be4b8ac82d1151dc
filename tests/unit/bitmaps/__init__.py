"""Tests of `qbackup.bitmaps`."""
