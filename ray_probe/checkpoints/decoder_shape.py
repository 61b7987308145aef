"""The widths of a decoder's layers, read from its transformers configuration."""

from dataclasses import dataclass
from typing import Any, Self

_INNER = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
_RECURRENT = ("linear_attention", "mamba", "conv")  # types of layers with a state of fixed size


@dataclass(frozen=True)
class DecoderLayer:
    """Widths of one decoder layer, in elements a token.

    Attributes:
        query: queries of all heads.
        key_value: keys and values of all heads that have their own, as attention takes them.
        cached: kept by the key-value cache.
        inner: the inner layer, of all experts of a token.
    """

    query: int
    key_value: int
    cached: int
    inner: int

    @classmethod
    def of(cls, config: Any, index: int) -> Self:
        """Read layer `index` from its configuration."""
        heads = int(config.num_attention_heads)
        inner = next((v for name in _INNER if (v := _at(getattr(config, name, None), index))), 4 * config.hidden_size)
        inner *= getattr(config, "num_experts_per_tok", None) or 1
        recurrent = _at(getattr(config, "layer_types", None), index) in _RECURRENT
        if getattr(config, "qk_nope_head_dim", None):  # one latent vector gives the keys and values of all heads
            query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
            latent = config.kv_lora_rank + config.qk_rope_head_dim
            return cls(query, query + heads * config.v_head_dim, 0 if recurrent else latent, inner)
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_value = 2 * head * (_at(getattr(config, "num_key_value_heads", None), index) or heads)
        return cls(head * heads, key_value, 0 if recurrent else key_value, inner)


@dataclass(frozen=True)
class DecoderShape:
    """Layers, hidden width and vocabulary of a decoder."""

    layers: tuple[DecoderLayer, ...]
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, model_config: Any) -> Self:
        """Read the shape; a configuration class may raise any error for a missing field."""
        text = model_config.get_text_config()
        count = int(text.num_hidden_layers)
        by_layer = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * count
        layers = tuple(DecoderLayer.of(config, index) for index, config in enumerate(by_layer))
        return cls(layers, text.hidden_size, text.vocab_size)

    @property
    def step_copies(self) -> int:
        """Elements a token of one layer's keys, values and queries, copied in a step."""
        return max(layer.key_value + 2 * layer.query for layer in self.layers)

    def activation_bytes(self, width: int) -> list[int]:
        """Return the bytes a token that each layer keeps for the backward pass.

        Args:
            width: bytes of an element.
        """
        return [self._layer_bytes(layer, width) for layer in self.layers]

    def _layer_bytes(self, layer: DecoderLayer, width: int) -> int:
        # Each of two norms saves its input and the normalised input in float32 or wider, and its output. Attention
        # saves rotated queries, keys, values and its output; the inner layer gate, activation, product and input.
        norms = 2 * self.hidden * (2 * max(4, width) + width)
        attention = width * (2 * layer.query + layer.key_value + self.hidden)
        return norms + attention + 4 * width * layer.inner


def _at(value: Any, index: int) -> Any:
    """Return the value of one layer, from a field with one value or a list of them."""
    return value[index] if isinstance(value, list | tuple) else value
