"""The backups of a repository: chosen by id or time, their chains and images checked."""
