"""What a run needs of a device's memory, from a checkpoint's headers and configuration; no weight is loaded.

A forecast, not a promise: what libraries and allocators take on top is not in it, nor the tables of `eager` attention,
nor a micro-batch's whole logits, which a model takes whose head is no linear layer (the log says so when it is loaded).
Measured peaks of scoring on a CPU, for five architectures in float32 and bfloat16, lie between 0.8 and 1.4 times it.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_probe.checkpoint_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TensorHeader,
    file_headers,
    read_json,
    weight_headers,
)
from ray_probe.config import ProbeConfig
from ray_probe.errors import ClusterError

BUFFERS = 2  # of gradients: `.grad` of the shard at hand, and the sum
WIDTH = {"float32": 4, "bfloat16": 2, "float64": 8}  # bytes of a number by model.dtype
CHUNK_ELEMENTS = 1 << 20  # numbers of a chunk of logits in `ray_probe.core.policy`
CHUNK_BYTES = 32  # of tables that a chunk is turned into at a time, a number of it: values, indices, masses


@dataclass(frozen=True)
class MemoryDemand:
    """Bytes that an actor needs on its device.

    Attributes:
        weights: of the model and the adapter, in the configured dtype.
        gradients: of all buffers, for the trainable parameters, in float32 or wider.
        activations: kept for the backward pass of one micro-batch.
        logits: of a chunk of rows, with its tables.
        cache: keys and values of one generation batch, and the tables of a step.
        held_a_position: kept for the backward pass, a position; part of `activations`.
        held_a_batch: kept for the backward pass of each micro-batch, however short it is; part of `activations`.
    """

    weights: int
    gradients: int
    activations: int
    logits: int
    cache: int
    held_a_position: int
    held_a_batch: int = 0

    @property
    def total(self) -> int:
        """Bytes in all: sampling and scoring take turns, so the larger of the two counts."""
        return self.weights + self.gradients + max(self.activations + self.logits, self.cache)

    def line(self) -> str:
        """The sum in one line."""
        if self.cache > self.activations + self.logits:
            work = f"key-value cache {size(self.cache)}"
        else:
            work = f"activations {size(self.activations)} + logits {size(self.logits)}"
        buffers = f"{BUFFERS} x {size(self.gradients // BUFFERS)}"
        return f"weights {size(self.weights)} + gradients {buffers} + {work} = {size(self.total)}"


def size(number: float) -> str:
    """Bytes as people write them: three digits, decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB" if number < 1000 else f"{number:.0f} TB"


def estimate(
    config: ProbeConfig, directory: Path, model_config: Any, longest_prompt: int, adapter: Path | None = None
) -> MemoryDemand:
    """What an actor of this run needs.

    Args:
        config: the run's configuration.
        directory: of the checkpoint.
        model_config: its transformers configuration.
        longest_prompt: of the run, in tokens.
        adapter: directory of the adapter on it, or None.

    Raises:
        CheckpointError: the headers cannot be read.
    """
    width = WIDTH[config.model.dtype]
    base = _sizes(weight_headers(directory))
    added = {} if adapter is None else file_headers(adapter, adapter / ADAPTER_WEIGHTS, "model.adapter")
    own = _sizes(added)
    copies = 0 if adapter is None else _expert_copies(adapter, added) * width
    trainable = _trainable(config.model.trainable, base, own)
    shape = _Shape.of(model_config)
    generation = config.generation
    positions = longest_prompt + generation.max_new_tokens
    micro_batch = min(generation.tf_batch_size * positions, max(generation.tf_batch_tokens, positions))
    recomputed = config.estimator.activation_checkpointing
    held = shape.hidden * shape.layers * width if recomputed else shape.activation_bytes(width)
    at_work = shape.activation_bytes(width) // shape.layers if recomputed else 0
    scored = min(generation.tf_batch_size * generation.max_new_tokens, micro_batch) * shape.vocabulary
    kept = 2 * (shape.layers * shape.key_value + shape.key_value + shape.attention) * width  # and a layer's copies
    layer_copies = copies // shape.layers  # of the layer at work; a graph holds those of all layers
    return MemoryDemand(
        weights=sum(base.values()) * width + sum(own.values()) * max(4, width),
        gradients=BUFFERS * max(4, width) * trainable,
        activations=micro_batch * (held + at_work) + (0 if recomputed else copies) + layer_copies,
        logits=min(scored, CHUNK_ELEMENTS) * CHUNK_BYTES,
        cache=generation.gen_batch_size * positions * kept
        + min(generation.gen_batch_size * shape.vocabulary, CHUNK_ELEMENTS) * CHUNK_BYTES
        + layer_copies,
        held_a_position=held,
        held_a_batch=0 if recomputed else copies,
    )


def check_fits(demand: MemoryDemand, device_bytes: int, device_name: str) -> None:
    """Refuse a run that needs more memory than its device has. Raises ClusterError with both numbers.

    Args:
        demand: of one actor.
        device_bytes: memory of the device; on a CPU the node's, divided by the actors on it.
        device_name: as people call it.
    """
    if demand.total > device_bytes:
        raise ClusterError(
            f"memory: an actor needs {demand.line()}, and {device_name} has {size(device_bytes)}; set model.trainable: "
            "adapter (with model.adapter), lower generation.tf_batch_size or gen_batch_size, or use a larger device"
        )


@dataclass(frozen=True)
class _Shape:
    """Of a decoder: layers, widths in numbers, vocabulary."""

    layers: int
    hidden: int
    inner: int
    attention: int
    key_value: int
    vocabulary: int

    @classmethod
    def of(cls, model_config: Any) -> "_Shape":
        text = model_config.get_text_config()
        hidden, heads = text.hidden_size, text.num_attention_heads
        head = getattr(text, "head_dim", None) or hidden // heads
        inner = next((v for name in _INNER if isinstance(v := getattr(text, name, None), int)), 4 * hidden)
        inner *= getattr(text, "num_experts_per_tok", None) or 1
        key_value = head * (getattr(text, "num_key_value_heads", None) or heads)
        return cls(text.num_hidden_layers, hidden, inner, head * heads, key_value, text.vocab_size)

    def activation_bytes(self, width: int) -> int:
        """Kept for the backward pass, a token: what norms, attention and the inner layer save in each layer.

        A norm saves its input and the normalised input in float32 or wider, and its output, twice a layer; attention
        saves rotated queries, keys, values and its output; the inner layer gate, activation, product and input.
        """
        norms = 2 * self.hidden * (2 * max(4, width) + width)
        attention = width * (2 * self.attention + 2 * self.key_value + self.hidden)
        return self.layers * (norms + attention + 4 * width * self.inner)


_INNER = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")


def _sizes(headers: Mapping[str, TensorHeader]) -> dict[str, int]:
    return {name: header.size for name, header in headers.items()}


def _expert_copies(adapter: Path, headers: Mapping[str, TensorHeader]) -> int:
    """Numbers of the fused expert weights that a LoRA changes: each forward pass makes a changed copy of them."""
    settings = read_json(adapter, ADAPTER_CONFIG, field="model.adapter")
    fused = tuple(f"{name.rpartition('.')[0]}." for name in settings.get("target_parameters") or ())
    total = 0
    for name, down in headers.items():
        up = headers.get(name.replace("lora_A", "lora_B"))
        if up is None or "lora_A" not in name or not any(path in name for path in (*fused, ".experts.")):
            continue
        experts = max(1, down.shape[0] // int(settings["r"]))
        total += experts * down.shape[1] * up.shape[0]
    return total


def _trainable(trainable: str, base: Mapping[str, int], own: Mapping[str, int]) -> int:
    """Numbers of the parameters that the gradient is of; names in files are taken for those in the model."""
    if trainable == "adapter":
        return sum(own.values())
    found = {**base, **own}
    return sum(count for name, count in found.items() if trainable == "all" or re.search(trainable, name))
