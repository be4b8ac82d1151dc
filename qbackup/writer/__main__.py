"""`python -m qbackup.writer`: started by `client`, of no use to anybody else."""

import sys

from qbackup.writer.process import main

main(sys.argv[1:])
