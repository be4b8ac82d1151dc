"""The second home of backups, an object store: docs/decisions/0014-object-store.md."""
