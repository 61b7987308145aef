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

from ray_probe.checkpoints.files import (
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
CHUNK_ELEMENTS = 1 << 20  # numbers of a chunk of logits in `ray_probe.core.policy.sampling`
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
        unknown: why `activations`, `logits` and `cache` could not be forecast and are 0; empty where they could.
        held_a_batch: kept for the backward pass of each micro-batch, however short it is; part of `activations`.
    """

    weights: int
    gradients: int
    activations: int
    logits: int
    cache: int
    held_a_position: int
    unknown: str = ""
    held_a_batch: int = 0

    @property
    def total(self) -> int:
        """Bytes in all: sampling and scoring take turns, so the larger of the two counts."""
        return self.weights + self.gradients + max(self.activations + self.logits, self.cache)

    def line(self) -> str:
        """The sum in one line."""
        buffers = f"{BUFFERS} x {size(self.gradients // BUFFERS)}"
        if self.unknown:
            known = f"weights {size(self.weights)} + gradients {buffers} = {size(self.total)}"
            return f"{known}, without activations, logits and cache ({self.unknown})"
        if self.cache > self.activations + self.logits:
            work = f"key-value cache {size(self.cache)}"
        else:
            work = f"activations {size(self.activations)} + logits {size(self.logits)}"
        return f"weights {size(self.weights)} + gradients {buffers} + {work} = {size(self.total)}"

    def note(self) -> str:
        """The sum, as a run says it when it starts: a warning where part of it could not be forecast."""
        return f"{'warning: ' * bool(self.unknown)}memory of an actor: {self.line()}"


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
    """What an actor of this run needs; without what depends on a shape where the configuration does not tell it.

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
    weights = sum(base.values()) * width + sum(own.values()) * max(4, width)
    gradients = BUFFERS * max(4, width) * trainable
    try:
        shape = _Shape.of(model_config)
    except Exception as error:  # classes of configurations raise whatever they like for a field that they do not have
        told = f"{type(model_config).__name__} does not tell its shape: {' '.join(str(error).split())[:120]}"
        return MemoryDemand(weights, gradients, activations=0, logits=0, cache=0, held_a_position=0, unknown=told)
    generation = config.generation
    positions = longest_prompt + generation.max_new_tokens
    micro_batch = min(generation.tf_batch_size * positions, max(generation.tf_batch_tokens, positions))
    recomputed = config.estimator.activation_checkpointing
    held = shape.hidden * len(shape.layers) * width if recomputed else shape.activation_bytes(width)
    at_work = shape.largest_layer_bytes(width) if recomputed else 0
    scored = min(generation.tf_batch_size * generation.max_new_tokens, micro_batch) * shape.vocabulary
    kept = (sum(layer.cached for layer in shape.layers) + shape.step_copies) * width
    layer_copies = copies // len(shape.layers)  # of the layer at work; a graph holds those of all layers
    return MemoryDemand(
        weights=weights,
        gradients=gradients,
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
class _Layer:
    """Widths of a decoder layer, in numbers.

    Attributes:
        query: queries of all heads.
        key_value: keys and values of all heads that have their own, as attention takes them.
        cached: what a cache keeps of a token.
        inner: the inner layer.
    """

    query: int
    key_value: int
    cached: int
    inner: int

    @classmethod
    def of(cls, config: Any, index: int) -> "_Layer":
        """From the configuration of this layer."""
        heads = int(config.num_attention_heads)
        inner = next((v for name in _INNER if (v := _at(getattr(config, name, None), index))), 4 * config.hidden_size)
        inner *= getattr(config, "num_experts_per_tok", None) or 1
        recurrent = _at(getattr(config, "layer_types", None), index) in _RECURRENT
        if getattr(config, "qk_nope_head_dim", None):  # keys and values of all heads are made of one latent vector
            query = heads * (config.qk_nope_head_dim + config.qk_rope_head_dim)
            latent = config.kv_lora_rank + config.qk_rope_head_dim
            return cls(query, query + heads * config.v_head_dim, 0 if recurrent else latent, inner)
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        key_value = 2 * head * (_at(getattr(config, "num_key_value_heads", None), index) or heads)
        return cls(head * heads, key_value, 0 if recurrent else key_value, inner)


@dataclass(frozen=True)
class _Shape:
    """Of a decoder: its layers, width in numbers, vocabulary."""

    layers: tuple[_Layer, ...]
    hidden: int
    vocabulary: int

    @classmethod
    def of(cls, model_config: Any) -> "_Shape":
        """From a configuration; raises what its class raises where a field is missing."""
        text = model_config.get_text_config()
        count = int(text.num_hidden_layers)
        by_layer = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text] * count
        return cls(tuple(_Layer.of(config, i) for i, config in enumerate(by_layer)), text.hidden_size, text.vocab_size)

    @property
    def step_copies(self) -> int:
        """Numbers a token that a step holds beside the cache: copies of the largest layer's keys, values, queries."""
        return max(layer.key_value + 2 * layer.query for layer in self.layers)

    def activation_bytes(self, width: int) -> int:
        """Kept for the backward pass, a token, by all layers."""
        return sum(self._layer_bytes(layer, width) for layer in self.layers)

    def largest_layer_bytes(self, width: int) -> int:
        """Kept for the backward pass, a token, by the layer that keeps most."""
        return max(self._layer_bytes(layer, width) for layer in self.layers)

    def _layer_bytes(self, layer: _Layer, width: int) -> int:
        """What norms, attention and the inner layer save.

        A norm saves its input and the normalised input in float32 or wider, and its output, twice a layer; attention
        saves rotated queries, keys, values and its output; the inner layer gate, activation, product and input.
        """
        norms = 2 * self.hidden * (2 * max(4, width) + width)
        attention = width * (2 * layer.query + layer.key_value + self.hidden)
        return norms + attention + 4 * width * layer.inner


_INNER = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")
_RECURRENT = ("linear_attention", "mamba", "conv")  # types of layers that keep a state of fixed size


def _at(value: Any, index: int) -> Any:
    """The value of a layer, from a field that holds one for all layers or a list of them."""
    return value[index] if isinstance(value, list | tuple) else value


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
