"""Unit tests: no QEMU runs here, and none of our own code is replaced."""
