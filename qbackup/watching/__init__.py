"""Following one QEMU from its start to its end, and the socket on which a watcher is asked."""
