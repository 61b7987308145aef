"""The gradient of an actor's round: shard by shard, each shard added whole or not at all.

A shard's gradient is formed in `.grad`, its squared norm is taken, and only then is it added to the round's sum; a
shard that fails half-way leaves nothing behind.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ray_probe.errors import NonFiniteError
from ray_probe.trainable import select_trainable

Vector = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the trainable parameters, in the order in which the flat gradient holds them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Numbers in the flat gradient."""
        return sum(int(np.prod(shape)) for shape in self.shapes)

    def unflatten(self, vector: Vector) -> dict[str, Vector]:
        """The flat gradient by parameter name."""
        sizes = [int(np.prod(shape)) for shape in self.shapes]
        parts = np.split(vector, np.cumsum(sizes)[:-1])
        return {name: part.reshape(s) for name, part, s in zip(self.names, parts, self.shapes, strict=True)}


class GradientSum:
    """The summed gradient of a round's shards on one actor (two float32 buffers: `.grad` and the sum)."""

    def __init__(self, model: torch.nn.Module, trainable: str) -> None:
        self._parameters = select_trainable(model, trainable)
        self.layout = Layout(tuple(self._parameters), tuple(tuple(p.shape) for p in self._parameters.values()))
        self._sums: list[torch.Tensor] | None = None

    def clear(self) -> None:
        """Drop what `.grad` holds, before a shard."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def reset(self) -> None:
        """Start a round: the sum of no shard."""
        self.clear()
        self._sums = None

    def add_shard(self) -> float:
        """Add the shard's gradient in `.grad` to the sum; returns its squared norm, float64.

        Raises NonFiniteError when the gradient is not finite: the sum is untouched then.
        """
        grads = [
            torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad for p in self._parameters.values()
        ]
        norm_sq = float(sum(torch.linalg.vector_norm(grad, dtype=torch.float64) ** 2 for grad in grads))
        if not np.isfinite(norm_sq):
            raise NonFiniteError("gradient: the shard's gradient holds NaN or infinity; it was not added")
        if self._sums is None:
            self._sums = [grad.detach().clone() for grad in grads]
        else:
            for total, grad in zip(self._sums, grads, strict=True):
                total += grad
        self.clear()
        return norm_sq

    def flat(self) -> Vector:
        """The sum as one vector in the order of `layout`."""
        if self._sums is None:
            return np.zeros(self.layout.size, np.float32)
        vector: Vector = torch.cat([total.flatten() for total in self._sums]).cpu().numpy()
        return vector
