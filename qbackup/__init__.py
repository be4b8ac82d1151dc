"""qbackup: backups of the disks of running QEMU virtual machines."""

__version__ = "0.1.0"
