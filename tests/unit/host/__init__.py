"""Tests of `qbackup.host`."""
