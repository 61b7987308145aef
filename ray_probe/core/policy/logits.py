"""Widens, scales and exponentiates logits, and reuses memory for tables.

Shape suffixes: R rows (one a token), V vocabulary, N some rows, K some tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = 1.0 / math.log(2.0)
LEAST = -80.0  # nats relative to a row's maximum; exp(-80) is lost in any sum over a vocabulary
_FLOOR = math.exp(LEAST) * 1.001
TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}  # fills a core's cache; on a GPU, repays the launch of a kernel


@dataclass(frozen=True)
class SamplingRule:
    """How logits become a policy; see docs/specification.md, "Sampling policy".

    Attributes:
        temperature: divides the logits; above 0.
        top_p: mass of the nucleus; above 0 and at most 1.
    """

    temperature: float
    top_p: float


def widened(logits: Tensor) -> Tensor:
    """Return logits in float32 or wider; copies only narrower ones."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def scaled(values: Tensor, largest: Tensor, temperature: float) -> Tensor:
    """Return (logits - largest) / temperature, nats; `largest` must broadcast."""
    # The division comes last: logits / temperature can be large, so the difference would lose digits or overflow.
    return (values - largest) / temperature


class Buffer:
    """Memory for one table at a time; a new table overwrites the previous one."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)  # kept, because on a CPU fresh memory costs more than the arithmetic on it

    def table(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return an uninitialised contiguous table in this memory."""
        elements, memory = math.prod(shape), self._memory
        if len(memory) < elements or memory.dtype != dtype or memory.device != device:
            self._memory = torch.empty(elements, dtype=dtype, device=device)
        return self._memory[:elements].view(tuple(shape))

    def like(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a table of the tensor's shape and device, and of its dtype by default."""
        return self.table(tensor.shape, dtype or tensor.dtype, tensor.device)


def exponentials(scaled_NK: Tensor) -> Tensor:
    """Return exponentials in float64; exactly 0 below exp(-80)."""
    # Below exp(-80), exp itself can be 40 times slower.
    return powers_of_two(scaled_NK.double() * LOG2_E)


def quick_exponentials(
    logits_RV: Tensor, largest_R1: Tensor, temperature: float, out_RV: Tensor, bits_RV: Tensor | None = None
) -> Tensor:
    """Write exponentials of scaled logits into `out_RV`, in its dtype.

    Their relative error is 1e-6 in float32, and none is below exp(-80).

    Args:
        logits_RV: raw logits.
        largest_R1: largest logit of each row.
        temperature: divides the logits.
        out_RV: receives the exponentials.
        bits_RV: receives scaled logits / log 2; None: not needed.

    Returns:
        `out_RV`.
    """
    # A power of two takes half the time of exp.
    bits_RV = out_RV if bits_RV is None else bits_RV
    torch.sub(logits_RV, largest_R1, out=bits_RV)
    bits_RV.mul_(LOG2_E / temperature).clamp_(min=LEAST * LOG2_E)
    return torch.exp2(bits_RV, out=out_RV)


def powers_of_two(bits_NK: Tensor, out_NK: Tensor | None = None) -> Tensor:
    """Return `2 ** bits`, exactly 0 below exp(-80); clamps `bits` in place."""
    bits_NK.clamp_(min=LEAST * LOG2_E)
    return without_least_(torch.exp2(bits_NK, out=out_NK))


def without_least_(mass_NK: Tensor) -> Tensor:
    """Set masses that were clamped at exp(-80) to 0, in place."""
    return torch.threshold_(mass_NK, _FLOOR, 0.0)


def tiles(rows: int, vocabulary: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Yield tiles of the vocabulary for a table of `rows` rows.

    Args:
        rows: rows of the table.
        vocabulary: its columns.
        device: decides how many elements a tile has.
        multiple: divides the width of every tile but the last.
    """
    size = TILE_ELEMENTS.get(device.type, TILE_ELEMENTS["cuda"]) // max(1, rows)
    size = max(multiple, size // multiple * multiple)
    return (slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size))
