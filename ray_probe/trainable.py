"""Which parameters the gradient is taken for, and the width in which it accumulates."""

import re
from collections.abc import Iterable

import torch

from ray_probe.errors import ConfigError, bad_value

_OWN, _REPLACED = "_adapter_parameters", "_replaced_parameters"
NO_ADAPTER = "there is no adapter; name its directory in model.adapter"


def accumulate_wide(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Have `.grad` of these parameters accumulate in float32 or wider, whatever the weights' dtype."""
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.grad_dtype = torch.promote_types(parameter.dtype, torch.float32)


def mark_adapter(model: torch.nn.Module, own: Iterable[str], replaced: Iterable[str]) -> None:
    """Keep on the model which of its parameters an adapter brought along.

    Args:
        model: the policy.
        own: names of the adapter's parameters.
        replaced: names of parameters which the adapter's own stand in for: nothing is computed from them.
    """
    setattr(model, _OWN, frozenset(own))
    setattr(model, _REPLACED, frozenset(replaced))


def adapter_parameters(model: torch.nn.Module) -> frozenset[str]:
    """Names of the parameters that `mark_adapter` named; none when the model has no adapter."""
    names: frozenset[str] = getattr(model, _OWN, frozenset())
    return names


def select_trainable(model: torch.nn.Module, trainable: str) -> dict[str, torch.nn.Parameter]:
    """Make exactly the chosen parameters require a gradient, accumulated in float32 or wider.

    Args:
        model: the policy.
        trainable: `all`, `adapter` (the adapter's parameters alone), or a regular expression that is searched for in
            parameter names.

    Raises:
        ConfigError: no parameter is chosen.
    """
    own = adapter_parameters(model)
    replaced: frozenset[str] = getattr(model, _REPLACED, frozenset())
    if trainable == "adapter" and not own:
        raise ConfigError(bad_value("model.trainable", trainable, NO_ADAPTER))
    chosen = {}
    for name, parameter in model.named_parameters():
        wanted = name not in replaced and _wanted(name, trainable, own)
        parameter.requires_grad_(wanted)
        if wanted:
            chosen[name] = parameter
    if not chosen:
        names = ", ".join([name for name, _ in model.named_parameters() if name not in replaced][:3])
        raise ConfigError(bad_value("model.trainable", trainable, f"no parameter matches; there are {names}, ..."))
    accumulate_wide(chosen.values())
    return chosen


def _wanted(name: str, trainable: str, own: frozenset[str]) -> bool:
    if trainable == "adapter":
        return name in own
    return trainable == "all" or re.search(trainable, name) is not None
