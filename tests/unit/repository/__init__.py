"""Tests of `qbackup.repository`."""
