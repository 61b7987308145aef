"""The last step of a language model, taken apart: hidden states of the trunk, and the head that makes logits of them.

Scoring needs only a few numbers of each row of logits. Where the head is a linear map, perhaps scaled and soft-capped,
they are made from hidden states in pieces, and the [T, V] table is never held. Whether that is so is not believed but
tried: the parts must give the model's own logits.

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
from ray_probe.model.context_length import context_length, rope_switch
from ray_probe.model.model_call import call_model

SCALES = {"logit_scale": 1.0, "logits_scaling": -1.0}
"""Fields of a model's configuration that multiply the logits, with the power that they are raised to."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""Fields that bound the logits: `cap * tanh(logits / cap)`."""
TRIED_TOKENS = 16
LOUD = 100.0
"""Logits are tried as they are, and so many times as large, where a soft cap shows."""


@dataclass(frozen=True)
class ModelHead:
    """A model in two: the trunk, and `logits = cap * tanh(scale * (hidden @ weight.T + bias) / cap)`.

    Attributes:
        trunk: the model below the head; gives hidden states.
        linear: the head's module: a linear layer, or one with a LoRA in it.
        scale: multiplies the logits.
        softcap: bounds them after that; None: nothing does.
    """

    trunk: Any
    linear: Any
    scale: float
    softcap: float | None

    def hidden(self, **inputs: Any) -> tuple[Tensor, Any]:
        """The trunk's hidden states [N, L, D] for a model's inputs, and its key-value cache."""
        output = call_model(self.trunk, **inputs)
        return output.last_hidden_state, getattr(output, "past_key_values", None)

    def logits(self, hidden_ND: Tensor, buffer: Buffer, factor: float = 1.0) -> Tensor:
        """Return the logits [N, V] of hidden states, without graph, in the buffer's memory.

        Args:
            hidden_ND: hidden states.
            buffer: memory for the logits.
            factor: multiplies the output of the linear layer.
        """
        matrices = self.matrices()
        products = Products.of(hidden_ND, replace(matrices, scale=matrices.scale * factor), buffer)
        return products.logits(slice(None), slice(None))

    def matrices(self, accumulate_into_grad: bool = False) -> Head:
        """Return the head's matrices, for token statistics; see `Head` for `accumulate_into_grad`."""
        base, adapter = _base(self.linear), None
        for name in _adapters(self.linear):
            down, up = self.linear.lora_A[name].weight, self.linear.lora_B[name].weight
            adapter = Adapter(down, up, self.linear.scaling[name])
        return Head(base.weight, base.bias, self.scale, self.softcap, adapter, accumulate_into_grad)


def find_head(model: Any) -> tuple[ModelHead | None, str]:
    """The model's head, and why there is none that can be taken apart, in one line (empty when there is).

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
    """The head of a model with these parts, if they give the model's logits."""
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
    """How the logits of the model's parts differ from its own; empty when they do not.

    Args:
        model: the model.
        head: its parts.
        factor: what comes out of the linear layer is multiplied by it.
    """
    ids = tried_ids(model)
    with _multiplied(head.linear, factor):
        whole = call_model(model, input_ids=ids, use_cache=False).logits
        hidden_1LD, _ = head.hidden(input_ids=ids, use_cache=False)
        parts = head.logits(hidden_1LD[0], Buffer(), factor).unsqueeze(0)
    return difference(whole, parts, _base(head.linear).weight.dtype)


def tried_ids(model: Any, most: int = TRIED_TOKENS) -> Tensor:
    """Some tokens [1, L] to try a model with: `most` of them, or as many as its context holds."""
    vocabulary, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    switch = rope_switch(model.config)
    length = min(most, context_length(model.config) or most, most if switch is None else switch.tokens)
    return torch.arange(length, device=device).mul(7).remainder(vocabulary).unsqueeze(0)


def difference(whole: Tensor, parts: Tensor, dtype: torch.dtype) -> str:
    """How logits that should be a model's own differ from them, in a few words; empty when they do not.

    Args:
        whole: its logits.
        parts: what should be equal but for the rounding of another order.
        dtype: of its weights.
    """
    if whole.shape != parts.shape:
        return f"logits of shape {tuple(parts.shape)}, not {tuple(whole.shape)}"
    gap, largest = float((whole.float() - parts.float()).abs().max()), float(whole.abs().max())
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 2e-2
    return "" if gap <= tolerance * max(1.0, largest) else f"logits that are {gap:.2g} off (of {largest:.2g})"


@contextmanager
def _multiplied(linear: torch.nn.Module, factor: float) -> Iterator[None]:
    """The module's output is multiplied during the block."""
    hook = linear.register_forward_hook(lambda module, inputs, output: output * factor)
    try:
        yield
    finally:
        hook.remove()


def _base(linear: Any) -> Any:
    """The linear layer itself, without a LoRA around it."""
    return getattr(linear, "base_layer", linear)


def _adapters(linear: Any) -> list[str]:
    """Names of the LoRAs at work in a head's module."""
    return [name for name in getattr(linear, "active_adapters", ()) if name in linear.lora_A]


def _is_linear(module: Any) -> bool:
    """A linear layer, or one plain LoRA around one: no DoRA, no bias of its own, nothing merged."""
    if not isinstance(_base(module), torch.nn.Linear):
        return False
    special = (*getattr(module, "use_dora", {}).values(), *getattr(module, "lora_bias", {}).values())
    if module is _base(module):
        return True
    return hasattr(module, "lora_A") and len(_adapters(module)) == 1 and not module.merged and not any(special)
