"""Which parameters the gradient is taken for, and the width in which it accumulates."""

import re
from collections.abc import Collection, Iterable

import torch

from ray_probe.checkpoints.files import some
from ray_probe.errors import ConfigError, bad_value

_OWN, _REPLACED, _FROZEN = "_adapter_parameters", "_replaced_parameters", "_frozen_parameters"
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


def mark_frozen(model: torch.nn.Module, names: Collection[str] = ()) -> None:
    """Keep on the model which parameters its architecture has frozen; the first call decides.

    Call it before an adapter is put in, which freezes the whole model.

    Args:
        model: the policy; its parameters that require no gradient are taken for frozen.
        names: of more that are.
    """
    if not hasattr(model, _FROZEN):
        named = model.named_parameters(remove_duplicate=False)
        setattr(model, _FROZEN, tuple(p for name, p in named if name in names or not p.requires_grad))


def frozen_out(model: torch.nn.Module, trainable: str) -> tuple[str, ...]:
    """Names of the parameters that `trainable` asks for and the architecture has frozen, a router's bias say."""
    return tuple(_asked(model, trainable)[1])


def select_trainable(model: torch.nn.Module, trainable: str) -> dict[str, torch.nn.Parameter]:
    """Make exactly the chosen parameters require a gradient, accumulated in float32 or wider.

    What the architecture has frozen stays frozen; see `frozen_out`.

    Args:
        model: the policy.
        trainable: `all`, `adapter` (the adapter's parameters alone), or a regular expression that is searched for in
            parameter names.

    Raises:
        ConfigError: no parameter is chosen.
    """
    if trainable == "adapter" and not adapter_parameters(model):
        raise ConfigError(bad_value("model.trainable", trainable, NO_ADAPTER))
    chosen, frozen = _asked(model, trainable)
    if not chosen:
        remedy = f"no parameter matches; there are {some(_used(model))}"
        if frozen:
            remedy = f"it matches only what the architecture has frozen ({some(frozen)}); choose other parameters"
        raise ConfigError(bad_value("model.trainable", trainable, remedy))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    accumulate_wide(chosen.values())
    return chosen


def _asked(
    model: torch.nn.Module, trainable: str
) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]]:
    """The parameters that are asked for by name: those that can be trained, and those that are frozen."""
    mark_frozen(model)
    frozen, own = {id(parameter) for parameter in getattr(model, _FROZEN)}, adapter_parameters(model)
    asked = {name: p for name, p in _used(model).items() if _wanted(name, trainable, own)}
    chosen = {name: p for name, p in asked.items() if id(p) not in frozen}
    return chosen, {name: p for name, p in asked.items() if id(p) in frozen}


def _used(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that are not replaced, each under the first of its names that is not."""
    replaced: frozenset[str] = getattr(model, _REPLACED, frozenset())
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
