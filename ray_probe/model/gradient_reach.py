"""Refuse trainable parameters that text does not reach.

The autograd graph of a text's logits names the parameters that the logits depend on, so no backward pass is needed.
A vision tower, for example, is refused at load and not after the first committed rounds.
"""

import inspect
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ray_probe.errors import ConfigError, bad_value, some
from ray_probe.model.agreement import tried_ids

SHORT, LONG = 8, 1024  # tokens of the texts that are tried
MOST_PARTS = 8
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_OF_ADAPTERS = "lora_|modules_to_save|trainable_tokens"
_WITH_BIASES = ("", r"|base_layer\.bias$", r"|bias$")  # of no layer, of the LoRA's layers, of all


def refuse_unreached(model: Any, chosen: Mapping[str, torch.nn.Parameter], trainable: str) -> None:
    """Refuse chosen parameters that the logits of text do not depend on.

    A parameter passes when a reached one differs from it only by numbers in its name, because one text does not reach
    every expert of a mixture. `ray_probe.run.round_checks.check_reached` checks those by their gradient.

    Args:
        model: the policy, on any device, `meta` included.
        chosen: the trainable parameters by name.
        trainable: `model.trainable`, for the message.

    Raises:
        ConfigError: with the number of parameters, the first names, and an expression that leaves them out.
    """
    unreached = _unreached(model, chosen, SHORT)
    if unreached:  # some models read whole blocks of tokens with separate parameters
        unreached = _unreached(model, {name: chosen[name] for name in unreached}, LONG)
    if unreached:
        what = f"{len(unreached)} of {len(chosen)} parameters take no part in what the model says of text"
        remedy = _without(unreached, chosen.keys() - set(unreached), trainable)
        raise ConfigError(bad_value("model.trainable", trainable, f"{what} ({some(unreached)}); {remedy}"))


def _unreached(model: Any, chosen: Mapping[str, torch.nn.Parameter], length: int) -> list[str]:
    """Return the chosen parameters whose kind a text of this length does not reach."""
    reached = _reached(model, length)
    kinds = {_kind(name) for name, parameter in model.named_parameters() if id(parameter) in reached}
    return [name for name, parameter in chosen.items() if id(parameter) not in reached and _kind(name) not in kinds]


def _reached(model: Any, length: int) -> set[int]:
    """Return the `id` of every parameter that the logits after a text depend on."""
    ids_1L = tried_ids(model, length)
    inputs: dict[str, Any] = {"logits_to_keep": 1}  # the last logits depend on everything that earlier ones do
    if ids_1L.is_meta:  # without a 4-D mask transformers reads the values of the mask
        width = ids_1L.shape[1]
        inputs |= {"attention_mask": torch.zeros(1, 1, width, width, device="meta"), "position_ids": ids_1L}
    accepted = inspect.signature(model.forward).parameters
    inputs = {name: value for name, value in inputs.items() if name in accepted}
    with _all_requiring(model.parameters()), torch.enable_grad():
        logits: Tensor = model(input_ids=ids_1L, use_cache=False, **inputs).logits
        found, seen, waiting = set(), set(), [logits.grad_fn]
        while waiting:
            node: Any = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            waiting.extend(before for before, _ in node.next_functions)
    return found


@contextmanager
def _all_requiring(parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """Make all parameters require a gradient during the block."""
    before = [(parameter, parameter.requires_grad) for parameter in parameters if parameter.is_floating_point()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


def _kind(name: str) -> str:
    """Return a parameter's name without the numbers of its layer and expert."""
    return _NUMBER.sub("N", name)


def _without(unreached: Collection[str], used: Collection[str], trainable: str) -> str:
    """Return the remedy: an expression that leaves the unreached parameters out."""
    parts = sorted({_part(name, used) for name in unreached})
    if len(parts) > MOST_PARTS:
        return "give an expression that leaves them out"
    rest = {"all": "", "adapter": f".*({_adapters(used)})"}.get(trainable, f".*({trainable})")
    return f"leave them out: model.trainable: '^(?!{'|'.join(parts)}){rest}'"


def _adapters(used: Collection[str]) -> str:
    """Return an expression that matches all of these parameters of an adapter."""
    expressions = [_OF_ADAPTERS + biases for biases in _WITH_BIASES]
    return next((one for one in expressions if all(re.search(one, name) for name in used)), expressions[-1])


def _part(name: str, used: Collection[str]) -> str:
    """Return an expression for the largest unused module around `name`."""
    steps = name.split(".")
    for count in range(1, len(steps) + 1):
        start = ".".join(steps[:count]) + ("." if count < len(steps) else "")
        if not any(other.startswith(start) for other in used):
            break
    exact = re.escape(start) + ("" if start.endswith(".") else "$")
    every = re.sub(r"(?<=\\\.)\d+(?=\\\.)", r"\\d+", exact)
    return exact if any(re.match(every, other) for other in used) else every
