"""aios-kvcache."""
