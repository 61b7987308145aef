"""A transformers model as this package calls it: forward pass, decoding, micro-batches."""
