"""Running a transformers model: forward pass, LM head, decoding, micro-batches."""
