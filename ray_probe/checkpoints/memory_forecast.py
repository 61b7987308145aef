"""Forecast the memory of an actor from a checkpoint's headers and configuration.

It is a forecast, not a promise. It omits what libraries and allocators add, the tables of `eager` attention, and a
micro-batch's whole logits, which a model without a linear LM head needs (the log says so at load). Measured peaks of
scoring on a CPU, for five architectures in float32 and bfloat16, are 0.8 to 1.4 times the forecast.
"""

import re
from collections.abc import Mapping
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ray_probe.checkpoints.decoder_shape import DecoderShape
from ray_probe.checkpoints.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_json
from ray_probe.checkpoints.headers import TensorHeader, file_headers, weight_headers
from ray_probe.config import ProbeConfig
from ray_probe.core.chunks import CHUNK_ELEMENTS
from ray_probe.errors import ClusterError

BUFFERS = 2  # of gradients: `.grad` of the current shard, and the sum
GradientUse = Literal["summed", "multiplied", "none"]
"""Whether a policy's gradient is summed, multiplied and freed parameter by parameter, or not taken."""
WIDTH = {"float32": 4, "bfloat16": 2, "float64": 8}  # bytes of an element by model.dtype
CHUNK_BYTES = 32  # of the tables of a chunk (values, indices, masses), for each of its logits


@dataclass(frozen=True)
class MemoryDemand:
    """Bytes that an actor needs on its device.

    Attributes:
        weights: of the model and the adapter, in the configured dtype.
        gradients: of all buffers, for the trainable parameters, in float32 or wider.
        activations: kept for the backward pass of one micro-batch.
        logits: of a chunk of rows, with its tables.
        cache: keys and values of one generation batch, and the tables of a step.
        held_a_position: part of `activations` that grows by each position.
        unknown: why `activations`, `logits` and `cache` are unknown and 0; empty if they are known.
        held_a_batch: part of `activations` that each micro-batch takes, however short it is.
        with_midpoint: a comparison measures parts, so it holds both models, or their midpoint and the update.
        in_turns: weights of the larger model of a comparison, which can hold one at a time; None: it cannot, or there
            is no comparison.
    """

    weights: int
    gradients: int
    activations: int
    logits: int
    cache: int
    held_a_position: int
    unknown: str = ""
    held_a_batch: int = 0
    with_midpoint: bool = False
    in_turns: int | None = None

    @property
    def one_at_a_time(self) -> "MemoryDemand":
        """The demand of a comparison that holds one model at a time."""
        assert self.in_turns is not None, "of a comparison"
        return replace(self, weights=self.in_turns)

    @property
    def total(self) -> int:
        """All bytes, with the larger of sampling and scoring, which take turns."""
        return self.weights + self.gradients + max(self.activations + self.logits, self.cache)

    def beside(self, other: "MemoryDemand") -> "MemoryDemand":
        """Return the demand of an actor that holds this model and another."""
        pairs = [pair for pair in zip(astuple(self), astuple(other), strict=True) if None not in pair]
        larger = MemoryDemand(*map(max, pairs))
        return replace(
            larger, weights=self.weights + other.weights, gradients=self.gradients + other.gradients,
            in_turns=larger.weights,
        )  # fmt: skip

    def line(self) -> str:
        """Format the sum in one line."""
        weights = f"weights {size(self.weights)}"
        if self.gradients:
            weights += f" + gradients {BUFFERS} x {size(self.gradients // BUFFERS)}"
        if self.unknown:
            return f"{weights} = {size(self.total)}, without activations, logits and cache ({self.unknown})"
        if self.cache > self.activations + self.logits:
            work = f"key-value cache {size(self.cache)}"
        else:
            work = f"activations {size(self.activations)} + logits {size(self.logits)}"
        return f"{weights} + {work} = {size(self.total)}"

    def note(self) -> str:
        """Format the sum for the start of a run; a warning if part of it is unknown."""
        return f"{'warning: ' * bool(self.unknown)}memory of an actor: {self.line()}"


def size(number: float) -> str:
    """Format bytes with three digits and decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB" if number < 1000 else f"{number:.0f} TB"


def estimate(
    config: ProbeConfig, directory: Path, model_config: Any, longest_prompt: int, adapter: Path | None = None,
    gradient: GradientUse = "summed",
) -> MemoryDemand:  # fmt: skip
    """Forecast what an actor of this run needs.

    Args:
        config: the run's configuration.
        directory: of the checkpoint.
        model_config: its transformers configuration; where that hides the shape, only weights and gradients are known.
        longest_prompt: of the run, in tokens.
        adapter: directory of the adapter on it, or None.
        gradient: what becomes of the gradient; the two policies of a comparison take none and keep no graph.

    Raises:
        CheckpointError: the headers cannot be read.
    """
    width = WIDTH[config.model.dtype]
    base = _sizes(weight_headers(directory))
    added = {} if adapter is None else file_headers(adapter, adapter / ADAPTER_WEIGHTS, "model.adapter")
    own = _sizes(added)
    copies = 0 if adapter is None else _expert_copies(adapter, added) * width
    weights = sum(base.values()) * width + sum(own.values()) * max(4, width)
    gradients = BUFFERS * max(4, width) * _buffered(gradient, config.model.trainable, base, own)
    try:
        shape = DecoderShape.of(model_config)
    except Exception as error:  # configuration classes raise any type for a missing field
        unknown = f"{type(model_config).__name__} does not tell its shape: {' '.join(str(error).split())[:120]}"
        return MemoryDemand(weights, gradients, activations=0, logits=0, cache=0, held_a_position=0, unknown=unknown)
    generation = config.generation
    positions = longest_prompt + generation.max_new_tokens
    micro_batch = min(generation.tf_batch_size * positions, max(generation.tf_batch_tokens, positions))
    recomputed = config.estimator.activation_checkpointing or gradient == "none"  # without graph at most that much
    by_layer = shape.activation_bytes(width)
    held = shape.hidden * len(shape.layers) * width if recomputed else sum(by_layer)
    recomputing = max(by_layer) if recomputed else 0
    scored = min(generation.tf_batch_size * generation.max_new_tokens, micro_batch) * shape.vocabulary
    kept = (sum(layer.cached for layer in shape.layers) + shape.step_copies) * width
    layer_copies = copies // len(shape.layers)  # of the current layer; a graph holds those of all layers
    return MemoryDemand(
        weights=weights,
        gradients=gradients,
        activations=micro_batch * (held + recomputing) + (0 if recomputed else copies) + layer_copies,
        logits=min(scored, CHUNK_ELEMENTS) * CHUNK_BYTES,
        cache=generation.gen_batch_size * positions * kept
        + min(generation.gen_batch_size * shape.vocabulary, CHUNK_ELEMENTS) * CHUNK_BYTES
        + layer_copies,
        held_a_position=held,
        held_a_batch=0 if recomputed else copies,
    )


def check_fits(demand: MemoryDemand, device_bytes: int, device_name: str) -> bool:
    """Refuse a run that needs more memory than its device has.

    Returns whether a comparison must hold one model at a time.

    Args:
        demand: of one actor.
        device_bytes: memory of the device; on a CPU the node's, divided by the actors on it.
        device_name: for the message.

    Raises:
        ClusterError: with both numbers.
    """
    if demand.total <= device_bytes:
        return False
    least = demand if demand.in_turns is None else demand.one_at_a_time
    if least.total <= device_bytes:
        return True
    alone = "set model.trainable: adapter (with model.adapter), " if demand.in_turns is None else ""
    smaller = "set compare.parts: false, " if demand.with_midpoint else alone
    raise ClusterError(
        f"memory: an actor needs {least.line()}, and {device_name} has {size(device_bytes)}; {smaller}"
        "lower generation.tf_batch_size or gen_batch_size, or use a larger device"
    )


def _sizes(headers: Mapping[str, TensorHeader]) -> dict[str, int]:
    return {name: header.size for name, header in headers.items()}


def _expert_copies(adapter: Path, headers: Mapping[str, TensorHeader]) -> int:
    """Return the elements of fused expert weights that a pass copies for a LoRA."""
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


def _buffered(gradient: GradientUse, trainable: str, base: Mapping[str, int], own: Mapping[str, int]) -> int:
    """Count the elements of a gradient that are held at once."""
    if gradient == "multiplied":  # the current parameter's, and the head's
        return max(base.values(), default=0)
    return _trainable(trainable, base, own) if gradient == "summed" else 0


def _trainable(trainable: str, base: Mapping[str, int], own: Mapping[str, int]) -> int:
    """Count trainable elements, taking names in files for names in the model."""
    if trainable == "adapter":
        return sum(own.values())
    found = {**base, **own}
    return sum(count for name, count in found.items() if trainable == "all" or re.search(trainable, name))
