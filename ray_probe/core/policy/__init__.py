"""From logits to token statistics: sampling, entropy, score and gradient of a row."""
