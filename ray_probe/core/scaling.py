"""What all of the policy starts from: logits less their row's maximum over temperature, and their exponentials.

Shape suffixes: R rows (one a token), V vocabulary, N some rows, K some tokens.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LOG2_E = 1.0 / math.log(2.0)
LEAST = -80.0  # nats below a row's maximum; exp(-80) cannot be told from 0 in a sum over a vocabulary
_FLOOR = math.exp(LEAST) * 1.001
_TILE_ELEMENTS = {"cpu": 1 << 19, "cuda": 1 << 24}


@dataclass(frozen=True)
class SamplingRule:
    """What turns logits into the sampling policy: temperature > 0 and 0 < top_p <= 1 (spec section 2)."""

    temperature: float
    top_p: float


def widened(logits: Tensor) -> Tensor:
    """Logits in float32 or wider; they themselves where they are already."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def scaled(values: Tensor, largest: Tensor, temperature: float) -> Tensor:
    """Logits over temperature less the row's largest, nats; `largest` must broadcast.

    In this order, because logits / temperature can be large: it would round away digits of the difference, or overflow.
    """
    return (values - largest) / temperature


def scaled_logits(logits_TV: Tensor, temperature: float) -> Tensor:
    """A whole table of scaled logits [T, V] in float32 or wider, nats; the largest of a row is 0."""
    wide_TV = widened(logits_TV)
    return scaled(wide_TV, wide_TV.amax(dim=-1, keepdim=True), temperature)


class Workspace:
    """Tables that are used again and again: on a CPU, fresh memory costs more than the arithmetic on it."""

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def table(self, name: str, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """A contiguous table of any content, at the place of the last one of this name."""
        numbers = math.prod(shape)
        memory = self._memory.get((name, dtype, device))
        if memory is None or len(memory) < numbers:
            memory = self._memory[name, dtype, device] = torch.empty(numbers, dtype=dtype, device=device)
        return memory[:numbers].view(tuple(shape))


def exponentials(scaled_NK: Tensor) -> Tensor:
    """Exponentials in float64; exactly 0 below exp(-80), where exp itself can be 40 times slower."""
    return powers_of_two(scaled_NK.double() * LOG2_E)


def quick_exponentials(
    logits_RV: Tensor, largest_R1: Tensor, temperature: float, out_RV: Tensor, bits_RV: Tensor | None = None
) -> Tensor:
    """Exponentials of scaled logits in their own dtype, into `out_RV`: 1e-6 relative in float32, never below exp(-80).

    A power of two, because it takes half the time of exp. `bits_RV` receives the exponents: scaled logits over log 2.
    """
    bits_RV = out_RV if bits_RV is None else bits_RV
    torch.sub(logits_RV, largest_R1, out=bits_RV)
    bits_RV.mul_(LOG2_E / temperature).clamp_(min=LEAST * LOG2_E)
    return torch.exp2(bits_RV, out=out_RV)


def powers_of_two(bits_NK: Tensor, out_NK: Tensor | None = None) -> Tensor:
    """`2 ** bits`; exactly 0 below exp(-80), at which `bits` is clamped in place."""
    bits_NK.clamp_(min=LEAST * LOG2_E)
    return without_least_(torch.exp2(bits_NK, out=out_NK))


def without_least_(mass_NK: Tensor) -> Tensor:
    """Put what was clamped at exp(-80) to 0, in place."""
    return torch.threshold_(mass_NK, _FLOOR, 0.0)


def tiles(rows: int, vocabulary: int, device: torch.device, multiple: int = 1) -> Iterator[slice]:
    """Slices of the vocabulary such that `rows` times a slice stays in a core's cache (on a GPU: is worth a launch)."""
    size = _TILE_ELEMENTS.get(device.type, _TILE_ELEMENTS["cuda"]) // max(1, rows)
    size = max(multiple, size // multiple * multiple)
    return (slice(start, min(start + size, vocabulary)) for start in range(0, vocabulary, size))
