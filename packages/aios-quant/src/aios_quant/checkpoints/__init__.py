"""Published quantised checkpoints: GPTQ, AWQ and compressed-tensors. `source` opens them; one file per format."""
