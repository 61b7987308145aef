"""How many positions a model can see."""

from typing import Any

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def context_length(model_config: Any) -> int | None:
    """Positions that a model can see, or None when its config (of transformers) names no limit."""
    text_config = model_config.get_text_config()
    for name in CONTEXT_FIELDS:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
