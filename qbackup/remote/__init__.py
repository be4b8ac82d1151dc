"""A second home for backups: an object store with the files of repositories.

`store` speaks to it, `layout` says what is where, `cipher` is what may stand between. What is done
with backups there is the business of `push`, `mirror` and `fetch`. See
docs/decisions/0014-object-store.md.
"""
