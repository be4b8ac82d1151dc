"""`python -m qbackup` is the command `qbackup`."""

from qbackup.cli.main import main

main()
