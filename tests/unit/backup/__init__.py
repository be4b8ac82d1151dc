"""Tests of `qbackup.backup`."""
