"""Tests of `qbackup.model`."""
