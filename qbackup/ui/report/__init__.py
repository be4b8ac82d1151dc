"""The report: one HTML page that needs nothing but itself, neither scripts nor other files."""
