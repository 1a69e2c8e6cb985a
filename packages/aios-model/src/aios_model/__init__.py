"""aios-model."""
