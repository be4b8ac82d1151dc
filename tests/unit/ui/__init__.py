"""Tests of `qbackup.ui`."""
