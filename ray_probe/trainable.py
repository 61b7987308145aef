"""Which parameters the gradient is taken for, and the width in which it accumulates."""

import re
from collections.abc import Iterable

import torch

from ray_probe.errors import ConfigError, bad_value


def accumulate_wide(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Have `.grad` of these parameters accumulate in float32 or wider, whatever the weights' dtype."""
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.grad_dtype = torch.promote_types(parameter.dtype, torch.float32)


def select_trainable(model: torch.nn.Module, trainable: str) -> dict[str, torch.nn.Parameter]:
    """Make exactly the chosen parameters require a gradient, accumulated in float32 or wider.

    Args:
        model: the policy.
        trainable: `all`, or a regular expression that is searched for in parameter names.

    Raises:
        ConfigError: no parameter is chosen.
    """
    chosen = {}
    for name, parameter in model.named_parameters():
        wanted = trainable == "all" or re.search(trainable, name) is not None
        parameter.requires_grad_(wanted)
        if wanted:
            chosen[name] = parameter
    if not chosen:
        some = ", ".join(name for name, _ in list(model.named_parameters())[:3])
        raise ConfigError(bad_value("model.trainable", trainable, f"no parameter matches; there are {some}, ..."))
    accumulate_wide(chosen.values())
    return chosen
