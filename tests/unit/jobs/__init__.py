"""Tests of `qbackup.jobs`."""
