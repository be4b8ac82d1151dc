"""Tests of `qbackup.images`."""
