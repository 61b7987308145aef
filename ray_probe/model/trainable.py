"""Select the parameters that require a gradient, and its dtype."""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch

from ray_probe.errors import ConfigError, bad_value, some

NO_ADAPTER = "there is no adapter; name its directory in model.adapter"
_MARKS = "_ray_probe_marks"


@dataclass
class _Marks:
    """Notes about a model's parameters, kept on the model.

    Attributes:
        own: names of the adapter's parameters.
        replaced: names under which the adapter's own parameters stand in for one.
        frozen: parameters that the architecture has frozen; None before `mark_frozen`.
    """

    own: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()
    frozen: tuple[torch.nn.Parameter, ...] | None = None


def _marks(model: torch.nn.Module) -> _Marks:
    marks: _Marks = vars(model).setdefault(_MARKS, _Marks())
    return marks


def accumulate_wide(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Accumulate the `.grad` of these parameters in float32 or wider."""
    for parameter in parameters:
        if parameter.is_floating_point():
            parameter.grad_dtype = torch.promote_types(parameter.dtype, torch.float32)


def mark_adapter(model: torch.nn.Module, own: Iterable[str], replaced: Iterable[str]) -> None:
    """Note on the model which parameters belong to an adapter.

    Args:
        model: the policy.
        own: names of the adapter's parameters.
        replaced: names under which the adapter's own parameters stand in for one. A parameter with another name, such
            as a head tied to the embedding, is still used under that name.
    """
    marks = _marks(model)
    marks.own, marks.replaced = frozenset(own), frozenset(replaced)


def adapter_parameters(model: torch.nn.Module) -> frozenset[str]:
    """Return the names of the adapter's parameters; empty without an adapter."""
    return _marks(model).own


def mark_frozen(model: torch.nn.Module, names: Collection[str] = ()) -> None:
    """Note the parameters that the architecture has frozen, at the first call.

    Call it before an adapter is put in, which freezes the whole model.

    Args:
        model: the policy; parameters that require no gradient count as frozen.
        names: of further frozen parameters.
    """
    marks = _marks(model)
    if marks.frozen is None:
        named = model.named_parameters(remove_duplicate=False)
        marks.frozen = tuple(p for name, p in named if name in names or not p.requires_grad)


def frozen_out(model: torch.nn.Module, trainable: str) -> tuple[str, ...]:
    """Return the parameters that `trainable` matches and the architecture has frozen."""
    return tuple(_asked(model, trainable)[1])


def select_trainable(model: torch.nn.Module, trainable: str) -> dict[str, torch.nn.Parameter]:
    """Make exactly the chosen parameters require a gradient, in float32 or wider.

    Frozen parameters of the architecture stay frozen; see `frozen_out`.

    Args:
        model: the policy.
        trainable: `all`, `adapter` (only the adapter's parameters), or a regular expression searched for in names.

    Returns:
        The chosen parameters by name.

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
    model.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    accumulate_wide(chosen.values())
    return chosen


def _asked(
    model: torch.nn.Module, trainable: str
) -> tuple[dict[str, torch.nn.Parameter], dict[str, torch.nn.Parameter]]:
    """Return the matching parameters: those that can be trained, and the frozen ones."""
    mark_frozen(model)
    frozen, own = set(map(id, _marks(model).frozen or ())), adapter_parameters(model)
    asked = {name: p for name, p in _used(model).items() if _matches(name, trainable, own)}
    chosen = {name: p for name, p in asked.items() if id(p) not in frozen}
    return chosen, {name: p for name, p in asked.items() if id(p) in frozen}


def _used(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters in use, each under its first name that is not replaced."""
    replaced = _marks(model).replaced
    names: dict[int, str] = {}
    used = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in replaced and names.setdefault(id(parameter), name) == name:
            used[name] = parameter
    return used


def _matches(name: str, trainable: str, own: frozenset[str]) -> bool:
    if trainable == "adapter":
        return name in own
    return trainable == "all" or re.search(trainable, name) is not None
