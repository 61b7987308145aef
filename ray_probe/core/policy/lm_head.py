"""The LM head, which maps hidden states to logits.

Shape suffixes: V vocabulary, D hidden size, E rank of an adapter.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

Entry = TypeVar("Entry")


@dataclass(frozen=True, eq=False)
class Adapter:
    """A low-rank addition to the head's weight, `up @ down * scaling`."""

    down_ED: Tensor
    up_VE: Tensor
    scaling: float


@dataclass(frozen=True, eq=False)
class Head:
    """The map `cap * tanh(scale * (weight @ h + bias) / cap)` from hidden states h.

    Attributes:
        weight_VD: tied to the embedding or not.
        bias_V: or None.
        scale: 1 where the architecture has none; the reciprocal where it divides the logits.
        softcap: the cap, or None.
        adapter: a LoRA on the head, or None.
        accumulate_into_grad: backward adds the weight's gradient to `weight_VD.grad`, in `grad_dtype`, and returns None
            for it to autograd; the weight must be a leaf.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapter: Adapter | None = None
    accumulate_into_grad: bool = False

    def chain_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn the gradient by logits into the gradient by the products, in place."""
        if self.softcap is not None:
            grad.mul_(1.0 - (logits / self.softcap).square_())
        return grad if self.scale == 1.0 else grad.mul_(self.scale)


def split_tensors(entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry], Entry | None]:
    """Split entries for a head's tensors into hidden states, weights and bias.

    Their order is all hidden states, then as many weights, then the bias; None if there is no bias.
    """
    pairs = len(entries) // 2
    return list(entries[:pairs]), list(entries[pairs : 2 * pairs]), entries[-1] if len(entries) % 2 else None
