"""Multiply a shard's gradient with an update of the weights, part by part.

Each parameter's gradient is multiplied and freed as soon as it is ready, so that no gradient of the model's size is
ever kept.

Shape suffix: G groups of parameters.
"""

from functools import partial

import torch
from torch import Tensor

from ray_probe.core.arrays import Array
from ray_probe.errors import NonFiniteError
from ray_probe.gradient.parameter_groups import parameter_groups
from ray_probe.model.trainable import select_trainable

PIECE = {"cpu": 1 << 16}
"""Numbers that are widened to float64 at once, by device."""
_LARGE_PIECE = 1 << 24


class GradientAlongUpdate:
    """Sums the products of gradients at one model with B - A, by group of parameters.

    Parameters that the architecture has frozen, and those that text does not reach, have no gradient: their share of
    the update counts as 0.

    Args:
        at: the model whose gradients are taken; all its parameters are made trainable.
        a: the model before the update, with parameters of the same names.
        b: the model after it.

    Attributes:
        groups: names of the groups, in the model's order.
    """

    def __init__(self, at: torch.nn.Module, a: torch.nn.Module, b: torch.nn.Module) -> None:
        group_of = parameter_groups(at)
        self.groups = tuple(dict.fromkeys(group_of.values()))
        self._parameters = select_trainable(at, "all")
        self._updates = {
            name: (self.groups.index(group_of[name]), a.get_parameter(name), b.get_parameter(name))
            for name in self._parameters
        }
        self._product_G: Tensor | None = None
        for name, parameter in self._parameters.items():
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        """Drop what earlier backward passes have left, before a shard."""
        self._product_G = None
        for parameter in self._parameters.values():
            parameter.grad = None

    def taken(self) -> Array:
        """Return the products [G] of all gradients since `clear`; no gradient is left.

        Raises:
            NonFiniteError: a product is NaN or infinite.
        """
        for name, parameter in self._parameters.items():
            # A fused head adds to `.grad` by itself, and autograd need not call a hook for it.
            self._take(name, parameter)
        found_G = torch.zeros(len(self.groups), dtype=torch.float64) if self._product_G is None else self._product_G
        self.clear()
        product_G: Array = found_G.cpu().numpy()
        if not torch.isfinite(found_G).all():
            raise NonFiniteError("gradient: the midpoint's gradient along the update holds NaN or infinity")
        return product_G

    @torch.no_grad()
    def _take(self, name: str, parameter: Tensor) -> None:
        """Add the product of a parameter's gradient, and free it."""
        grad, parameter.grad = parameter.grad, None
        if grad is None:
            return
        place, a, b = self._updates[name]
        if self._product_G is None:
            self._product_G = torch.zeros(len(self.groups), dtype=torch.float64, device=grad.device)
        self._product_G[place] += product_along(grad, a, b)


def product_along(grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return `<grad, b - a>` in float64, a tensor of one number on their device."""
    size = PIECE.get(grad.device.type, _LARGE_PIECE)
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for grad_N, a_N, b_N in zip(*(torch.split(one.flatten(), size) for one in (grad, a, b)), strict=True):
        total += torch.dot(grad_N.double(), b_N.double() - a_N.double())
    return total
