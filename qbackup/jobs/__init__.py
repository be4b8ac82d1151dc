"""What the commands do, from beginning to end. Knows no terminal and no command line."""
