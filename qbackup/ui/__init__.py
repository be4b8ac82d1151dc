"""What people and programs see: progress, tables, JSON. Decides nothing."""
