"""Activation checkpointing: layers keep only their input for the backward pass.

transformers' own checkpointing needs training mode, which enables dropout. Here the model stays in eval mode.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from ray_probe.errors import ConfigError, bad_value


def set_recompute(model: torch.nn.Module, on: bool) -> None:
    """Switch activation checkpointing on or off in every decoder layer.

    Raises:
        ConfigError: the architecture has no layers to recompute, and `on` is set.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if on and not layers:
        remedy = f"{type(model).__name__} has no layers to recompute, set it to false"
        raise ConfigError(bad_value("estimator.activation_checkpointing", on, remedy))
    for layer in layers:
        vars(layer).pop("forward", None)
        if on:
            vars(layer)["forward"] = _recomputed(layer.forward)


def _recomputed(forward: Any) -> Any:
    def in_backward(*inputs: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **named)

    return in_backward
