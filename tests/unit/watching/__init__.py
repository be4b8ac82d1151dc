"""Tests of `qbackup.watching`."""
