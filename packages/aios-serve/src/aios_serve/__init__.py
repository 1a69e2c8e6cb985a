"""aios-serve."""
