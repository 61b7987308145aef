"""The size of a chunk of logits, known without torch."""

CHUNK_ELEMENTS = 1 << 20  # logits of a chunk of rows
