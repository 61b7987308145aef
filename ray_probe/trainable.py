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
        replaced: names under which the adapter's own stand in for a parameter. A parameter that has another name too,
            as a head that is tied to the embedding has, is computed with under that one.
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
    used = _used(model, replaced)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    chosen = {name: parameter for name, parameter in used.items() if _wanted(name, trainable, own)}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    if not chosen:
        names = ", ".join(list(used)[:3])
        raise ConfigError(bad_value("model.trainable", trainable, f"no parameter matches; there are {names}, ..."))
    accumulate_wide(chosen.values())
    return chosen


def _used(model: torch.nn.Module, replaced: frozenset[str]) -> dict[str, torch.nn.Parameter]:
    """The parameters that logits are computed from, each under the first of its names that is not replaced."""
    names: dict[int, str] = {}
    used = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in replaced and names.setdefault(id(parameter), name) == name:
            used[name] = parameter
    return used


def _wanted(name: str, trainable: str, own: frozenset[str]) -> bool:
    if trainable == "adapter":
        return name in own
    return trainable == "all" or re.search(trainable, name) is not None
