"""The sizes that qbackup supports. Imports nothing: the writer process starts with it."""

MIN_GRANULARITY_BYTES = 4096
MAX_GRANULARITY_BYTES = 2 * 1024 * 1024
MAX_DISK_BYTES = 64 * 1024**4
"""Disks up to 64 TiB; larger sizes in a file are taken for damage."""
MAX_PARALLEL = 64
"""VMs that are worked on at once, and objects that are on their way to a remote or from it."""
MIN_LIMIT_RATE_BYTES = 1024
"""A second, to or from a remote: what is slower takes a pause for a failure."""
