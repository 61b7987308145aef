"""The gradient sum of one actor: each shard is added completely or not at all."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ray_probe.errors import NonFiniteError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.model.trainable import frozen_out, select_trainable

Vector = npt.NDArray[np.floating[Any]]
_PIECE = 1 << 16  # numbers that stay in a core's cache as float64


class GradientSum:
    """The summed gradient of an actor's shards since the last commit.

    Memory: two buffers of the parameters' size, `.grad` and the sum, usually float32.

    Attributes:
        parameters: the trainable parameters by name, in the order of `layout`.
        frozen: names that `trainable` asks for and the architecture has frozen; they are left out.
        layout: names and shapes of the parameters.
    """

    def __init__(self, model: torch.nn.Module, trainable: str) -> None:
        self.parameters = select_trainable(model, trainable)
        self.frozen = frozen_out(model, trainable)
        self.layout = ParameterLayout(tuple(self.parameters), tuple(tuple(p.shape) for p in self.parameters.values()))
        self._sums: list[torch.Tensor] | None = None
        self._reached: set[int] = set()

    @property
    def unreached(self) -> tuple[int, ...]:
        """Parameters, by place in the layout, without a gradient from any shard."""
        return tuple(place for place in range(len(self.parameters)) if place not in self._reached)

    def clear(self) -> None:
        """Clear `.grad` before a shard."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def reset(self) -> None:
        """Clear the sum."""
        self.clear()
        self._sums = None
        self._reached = set()

    def add_shard(self) -> float:
        """Add the shard's gradient in `.grad` to the sum; returns its squared norm.

        Raises NonFiniteError for a gradient that is not finite; the sum is unchanged then.
        """
        grads = [
            torch.zeros_like(p, dtype=p.grad_dtype) if p.grad is None else p.grad for p in self.parameters.values()
        ]
        norm_sq = sum(_square(grad) for grad in grads)
        if not np.isfinite(norm_sq):
            raise NonFiniteError("gradient: the shard's gradient holds NaN or infinity; it was not added")
        if self._sums is None:
            self._sums = grads  # `clear` below gives up the references in `.grad`
        else:
            for total, grad in zip(self._sums, grads, strict=True):
                total += grad
        self._reached |= {place for place, p in enumerate(self.parameters.values()) if p.grad is not None}
        self.clear()
        return norm_sq

    def bucket(self, start: int, stop: int) -> Vector:
        """Returns a copy of a range of the flat sum [stop - start], on the CPU."""
        wide = any(parameter.grad_dtype == torch.float64 for parameter in self.parameters.values())
        result = torch.zeros(stop - start, dtype=torch.float64 if wide else torch.float32)
        places = zip(self._sums, self.layout.ranges(), strict=True) if self._sums is not None else ()
        for total, (_, _, first, last) in places:
            low, high = max(first, start), min(last, stop)
            if low < high:
                result[low - start : high - start] = total.flatten()[low - first : high - first]
        vector: Vector = result.numpy()
        return vector


def _square(grad: torch.Tensor) -> float:
    """Returns the squared norm in float64."""
    if grad.device.type != "cpu":
        return float(torch.linalg.vector_norm(grad, dtype=torch.float64).square())
    # On a CPU `vector_norm` would first copy the whole tensor to float64.
    wide = (piece.double() for piece in torch.split(grad.flatten(), _PIECE))
    return float(sum(torch.dot(piece, piece) for piece in wide))
