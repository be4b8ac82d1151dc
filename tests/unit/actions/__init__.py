"""Tests of `qbackup.actions`."""
