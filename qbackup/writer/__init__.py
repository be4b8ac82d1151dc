"""The writer process: it reads disks over NBD and writes a backup's images into the repository.

Everything that touches the repository during a backup happens in a process of its own, which
can be killed at any moment (docs/decisions/0007-writer-process.md). `client` is what the rest of
qbackup uses; the other modules are the process, and import little: it has to start quickly.

Must not know QMP.
"""
