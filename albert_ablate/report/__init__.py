"""Pages and charts of runs, and the tables for notebooks."""
