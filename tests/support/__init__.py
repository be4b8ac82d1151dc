"""What the tests share: real QEMUs, a repository, the command line, a model of a disk."""
