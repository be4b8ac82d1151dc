"""Tests of `qbackup.catalog`."""
