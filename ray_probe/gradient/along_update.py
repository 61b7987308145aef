"""Multiply a shard's gradient with an update of the weights, part by part.

Each parameter's gradient is multiplied and freed as soon as it is ready, so that no gradient of the model's size is
ever kept.

Shape suffix: G groups of parameters.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
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
    """Sums products of gradients with an update, by group of parameters.

    Parameters that the architecture has frozen, and those that text does not reach, have no gradient: their share of
    the update counts as 0.

    Args:
        at: the model whose gradients are taken; all its parameters are made trainable.
        update: a model with parameters of the same names, which hold B - A.

    Attributes:
        groups: names of the groups, in the model's order.
    """

    def __init__(self, at: torch.nn.Module, update: torch.nn.Module) -> None:
        group_of = parameter_groups(at)
        self.groups = tuple(dict.fromkeys(group_of.values()))
        self._parameters = select_trainable(at, "all")
        self._updates = {
            name: (self.groups.index(group_of[name]), update.get_parameter(name)) for name in self._parameters
        }
        self._product_G: Tensor | None = None

    def products(self, backward: Callable[[], object]) -> Array:
        """Return the products [G] of all gradients of backward passes; none is left.

        Args:
            backward: makes the passes.

        Raises:
            NonFiniteError: a product is NaN or infinite.
        """
        self._product_G = None
        for parameter in self._parameters.values():
            parameter.grad = None
        # The model's parameters outlive this object, and a hook left on them would take later gradients away.
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._take, name))  # type: ignore[no-untyped-call]
            for name, parameter in self._parameters.items()
        ]
        try:
            backward()
            for name, parameter in self._parameters.items():
                # A fused head adds to `.grad` by itself, and autograd need not call a hook for it.
                self._take(name, parameter)
        finally:
            for hook in hooks:
                hook.remove()
            for parameter in self._parameters.values():
                parameter.grad = None
        found_G, self._product_G = self._product_G, None
        if found_G is None:
            return np.zeros(len(self.groups))
        product_G: Array = found_G.cpu().numpy()
        if not np.isfinite(product_G).all():
            raise NonFiniteError("gradient: the midpoint's gradient along the update holds NaN or infinity")
        return product_G

    @torch.no_grad()
    def _take(self, name: str, parameter: Tensor) -> None:
        """Add the product of a parameter's gradient, and free it."""
        grad, parameter.grad = parameter.grad, None
        if grad is None:
            return
        place, update = self._updates[name]
        if self._product_G is None:
            self._product_G = torch.zeros(len(self.groups), dtype=torch.float64, device=grad.device)
        self._product_G[place] += product_along(grad, update)


def product_along(grad: Tensor, update: Tensor) -> Tensor:
    """Return `<grad, update>` in float64, a tensor of one number on their device."""
    size = PIECE.get(grad.device.type, _LARGE_PIECE)
    total = torch.zeros((), dtype=torch.float64, device=grad.device)
    for grad_N, update_N in zip(*(torch.split(one.flatten(), size) for one in (grad, update)), strict=True):
        total += torch.dot(grad_N.double(), update_N.double())
    return total
