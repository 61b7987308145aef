"""The oracle that shares no code with the estimator, and the gradient that the estimator left."""

from typing import Any

import torch
from torch import Tensor

from ray_probe.doctor.enumeration import Enumerated, enumerate_policy, oracle_policy

__all__ = ["Enumerated", "enumerate_policy", "flat_gradient", "oracle_policy"]


def flat_gradient(model: Any) -> Tensor:
    """`.grad` of all parameters as one vector; the gradients are cleared."""
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
    model.zero_grad(set_to_none=True)
    return flat
