"""What each command does, step by step: one module for each. Knows no terminal and no raw QMP."""
