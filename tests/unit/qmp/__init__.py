"""Tests of `qbackup.qmp`."""
