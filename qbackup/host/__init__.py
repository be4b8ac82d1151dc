"""This host: processes and tasks, sockets, locks, and writes that survive a power cut."""
