"""Tests of `qbackup.cli`."""
