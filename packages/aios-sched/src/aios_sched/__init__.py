"""aios-sched."""
