"""The repository on disk: directories, locks, manifests. Knows no QEMU."""
