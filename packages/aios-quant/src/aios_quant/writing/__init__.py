"""Writing checkpoints that AIOS, transformers and vLLM read: config, tokenizer, weights in codes, and their shards."""
