"""Put the policy halfway between two models, and the update, in the models' place."""

from typing import Any

import torch
from torch import Tensor

from ray_probe.errors import ConfigError, bad_value

NEEDS = "parts need checkpoints of one architecture; set it to false"


def check_same_tensors(a: Any, b: Any) -> None:
    """Refuse two models that have no midpoint.

    Raises:
        ConfigError: their tensors differ in name or shape, or in which names share one.
    """
    first, second = _shapes(a), _shapes(b)
    differ = {name for name in first.keys() | second.keys() if first.get(name) != second.get(name)}
    if differ:
        what = f"the checkpoints differ in {len(differ)} tensors ({min(differ)})"
        raise ConfigError(bad_value("compare.parts", True, f"{what}; {NEEDS}"))


@torch.no_grad()
def replace_by_midpoint(a: Any, b: Any) -> None:
    """Replace the weights of A by the mean of A and B, and those of B by B - A.

    So the memory of two models is enough: it takes one tensor more. Neither model can be had back from the results;
    load their checkpoints again. It covers parameters and what else a checkpoint holds in floating point. The mean and
    the difference are taken in float32 or wider and rounded to the models' dtype. The difference of two numbers within
    a factor of 2 of each other is exact in any dtype (Sterbenz), so an update of small steps loses nothing.

    Args:
        a: a model without an adapter; it becomes the midpoint.
        b: another of the same architecture, on the same device; it holds the update and is no policy any more.

    Raises:
        ConfigError: see `check_same_tensors`.
    """
    check_same_tensors(a, b)
    second = _tensors(b)
    for name, tensor in _tensors(a).items():
        wide = torch.promote_types(tensor.dtype, torch.float32)
        from_a, from_b = tensor.to(wide), second[name].to(wide)
        update = from_b - from_a
        tensor.copy_(from_a.add_(from_b).div_(2.0))  # in place where the dtype is wide already
        second[name].copy_(update)


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return parameters and persistent buffers in floating point, each once.

    One with several names has the first: a second change in place would be wrong.
    """
    state = model.state_dict(keep_vars=True)  # without it tied names give tensors of their own
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: state[name] for name in state if name == first[id(state[name])] and state[name].is_floating_point()}


def _shapes(model: Any) -> dict[str, tuple[object, str]]:
    """Return of each floating-point tensor its shape and the first of its names."""
    state = model.state_dict(keep_vars=True)
    first = {id(tensor): name for name, tensor in reversed(state.items())}
    return {name: (one.shape, first[id(one)]) for name, one in state.items() if one.is_floating_point()}
