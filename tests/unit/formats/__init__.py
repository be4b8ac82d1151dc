"""Tests of `qbackup.formats`."""
