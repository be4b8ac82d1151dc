#!/bin/sh
# A virtual environment of its own; -I: nothing of the caller's gets in.
exec /usr/lib/qbackup/bin/python3 -I -m qbackup "$@"
