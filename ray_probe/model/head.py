"""Split a language model into its trunk and its LM head.

Scoring needs only a few numbers of each row of logits. If the head is a linear map, perhaps scaled and soft-capped,
these come from hidden states piece by piece, without the [T, V] table. A trial decides: the parts must give the
model's own logits.

Shape suffixes: N rows of a batch, L positions, T tokens, D hidden width, V vocabulary.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ray_probe.core.policy.head_products import Products
from ray_probe.core.policy.lm_head import Adapter, Head
from ray_probe.core.policy.logits import Buffer
from ray_probe.model.agreement import difference, tried_ids
from ray_probe.model.model_call import call_model

SCALES = {"logit_scale": 1.0, "logits_scaling": -1.0}
"""Fields of a configuration that multiply the logits, with their exponents."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Fields that bound the logits: `cap * tanh(logits / cap)`."""
LOUD = 100.0
"""Logits are tried at this multiple too, where a soft cap shows."""


@dataclass(frozen=True)
class ModelHead:
    """A trunk and its LM head.

    `logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap)`

    Attributes:
        trunk: the model below the head, which returns hidden states.
        linear: module of the head: a linear layer, perhaps with a LoRA.
        scale: multiplies the logits.
        softcap: bounds the scaled logits; None: no bound.
    """

    trunk: Any
    linear: Any
    scale: float
    softcap: float | None

    def hidden(self, **inputs: Any) -> tuple[Tensor, Any]:
        """Run the trunk; returns hidden states [N, L, D] and the key-value cache."""
        output = call_model(self.trunk, **inputs)
        return output.last_hidden_state, getattr(output, "past_key_values", None)

    def logits(self, hidden_ND: Tensor, buffer: Buffer, factor: float = 1.0) -> Tensor:
        """Return the logits [N, V] of hidden states, without graph, in the buffer.

        Args:
            hidden_ND: hidden states.
            buffer: memory for the logits.
            factor: multiplies the output of the linear layer.
        """
        matrices = self.matrices()
        products = Products.of(hidden_ND, replace(matrices, scale=matrices.scale * factor), buffer)
        return products.logits(slice(None), slice(None))

    def matrices(self, accumulate_into_grad: bool = False) -> Head:
        """Return the head's matrices; see `Head` for `accumulate_into_grad`."""
        base, adapter = _base(self.linear), None
        for name in _adapters(self.linear):
            down, up = self.linear.lora_A[name].weight, self.linear.lora_B[name].weight
            adapter = Adapter(down, up, self.linear.scaling[name])
        return Head(base.weight, base.bias, self.scale, self.softcap, adapter, accumulate_into_grad)


def find_head(model: Any) -> tuple[ModelHead | None, str]:
    """Find the LM head; returns it, or None and the reason in one line.

    Args:
        model: a transformers causal language model in eval mode.
    """
    linear, trunk = model.get_output_embeddings(), model.base_model
    if trunk is model or not _is_linear(linear):
        return None, f"the head of {type(model).__name__} is no linear layer over a trunk"
    if any(linear.lora_A[name].weight.dtype != _base(linear).weight.dtype for name in _adapters(linear)):
        return None, f"the LoRA on the head of {type(model).__name__} has another dtype than the head"
    try:
        return _tried(model, trunk, linear)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return None, f"{type(model).__name__} could not be taken apart ({type(error).__name__}: {error})".split("\n")[0]


def _tried(model: Any, trunk: Any, linear: Any) -> tuple[ModelHead | None, str]:
    """Return the head with these parts if they give the model's logits."""
    config = model.config.get_text_config()
    scale = math.prod(float(getattr(config, name, None) or 1.0) ** power for name, power in SCALES.items())
    cap = next((value for name in SOFT_CAPS if (value := getattr(config, name, None)) is not None), None)
    head = ModelHead(trunk, linear, scale, None if cap is None else float(cap))
    for factor in (1.0, LOUD):
        what = _difference(model, head, factor)
        if what:
            return None, f"{type(model).__name__} does more to its logits than a linear head: its parts give {what}"
    return head, ""


@torch.no_grad()
def _difference(model: Any, head: ModelHead, factor: float) -> str:
    """Describe how the logits of a model's parts differ from its own.

    Args:
        model: the model.
        head: its parts.
        factor: multiplies the output of the linear layer.
    """
    ids = tried_ids(model)
    with _multiplied(head.linear, factor):
        whole = call_model(model, input_ids=ids, use_cache=False).logits
        hidden_1LD, _ = head.hidden(input_ids=ids, use_cache=False)
        parts = head.logits(hidden_1LD[0], Buffer(), factor).unsqueeze(0)
    return difference(whole, parts, _base(head.linear).weight.dtype)


@contextmanager
def _multiplied(linear: torch.nn.Module, factor: float) -> Iterator[None]:
    """Multiply the module's output during the block."""
    hook = linear.register_forward_hook(lambda module, inputs, output: output * factor)
    try:
        yield
    finally:
        hook.remove()


def _base(linear: Any) -> Any:
    """Return the linear layer itself, without a LoRA around it."""
    return getattr(linear, "base_layer", linear)


def _adapters(linear: Any) -> list[str]:
    """Return the names of the active LoRAs of a head's module."""
    return [name for name in getattr(linear, "active_adapters", ()) if name in linear.lora_A]


def _is_linear(module: Any) -> bool:
    """Return whether this is a linear layer, perhaps with one plain, unmerged LoRA."""
    if not isinstance(_base(module), torch.nn.Linear):
        return False
    special = (*getattr(module, "use_dora", {}).values(), *getattr(module, "lora_bias", {}).values())
    if module is _base(module):
        return True
    return hasattr(module, "lora_A") and len(_adapters(module)) == 1 and not module.merged and not any(special)
