"""The parts of a backup: judge, plan, freeze, copy. Knows no command line."""
