"""Build the policy halfway between two models of one architecture."""

import copy
from typing import Any

import torch
from torch import Tensor

from ray_probe.errors import ConfigError, bad_value

NEEDS = "parts need checkpoints of one architecture; set it to false"


@torch.no_grad()
def midpoint_of(a: Any, b: Any) -> Any:
    """Return a new model whose weights are the mean of those of two models.

    The mean is taken in float32 or wider and rounded to the models' dtype. It covers parameters and what else a
    checkpoint holds in floating point. The two models are only read.

    Args:
        a: a model without an adapter, whose layers recompute nothing.
        b: another of the same architecture, on the same device.

    Raises:
        ConfigError: their tensors differ in name or shape.
    """
    first, second = _tensors(a), _tensors(b)
    if {name: one.shape for name, one in first.items()} != {name: one.shape for name, one in second.items()}:
        differ = first.keys() ^ second.keys() or {n for n, one in first.items() if one.shape != second[n].shape}
        what = f"the checkpoints differ in {len(differ)} tensors ({min(differ)})"
        raise ConfigError(bad_value("compare.parts", True, f"{what}; {NEEDS}"))
    middle = copy.deepcopy(a)
    for name, tensor in _tensors(middle).items():
        wide = torch.promote_types(tensor.dtype, torch.float32)
        tensor.copy_(first[name].to(wide).add(second[name].to(wide)).div_(2.0))
    return middle


def _tensors(model: Any) -> dict[str, Tensor]:
    """Return parameters and persistent buffers in floating point by name."""
    return {name: one for name, one in model.state_dict().items() if one.is_floating_point()}
