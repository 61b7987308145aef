"""Tokens to try a model with, and comparisons of logits that should be equal.

Shape suffixes: L positions, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor

from ray_probe.model.context_length import context_length, rope_switch

TRIED_TOKENS = 16
ROUNDING, BROKEN = (3e-5, 0.1), (1e-2, 0.1)
"""Largest gap of logits by rounding, and of a model that is not refused, in units of their spread.

The first number is for float32 or wider, the second for narrower dtypes. For 166 architectures rounding was at most
7e-6, and 0.03 in bfloat16 over 24 layers. Faults were at 0.03 to 1, and a cache that loses a little at 1e-4."""


def tried_ids(model: Any, most: int = TRIED_TOKENS) -> Tensor:
    """Return at most `most` tokens [1, L] to try a model with, within its context."""
    vocabulary, device = model.get_input_embeddings().weight.shape[0], next(model.parameters()).device
    switch = rope_switch(model.config)
    length = min(most, context_length(model.config) or most, most if switch is None else switch.tokens)
    return torch.arange(length, device=device).mul(7).remainder(vocabulary).unsqueeze(0)


def is_wide(dtype: torch.dtype) -> bool:
    """Return whether numbers of this dtype round as float32 or better."""
    return dtype in (torch.float32, torch.float64)


def difference(whole: Tensor, parts: Tensor, dtype: torch.dtype) -> str:
    """Describe how logits differ beyond rounding; empty if they do not.

    Args:
        whole: the model's logits.
        parts: the logits to compare, computed in another order.
        dtype: of its weights.
    """
    if whole.shape != parts.shape:
        return f"logits of shape {tuple(parts.shape)}, not {tuple(whole.shape)}"
    gap, largest = float((whole.float() - parts.float()).abs().max()), float(whole.abs().max())
    tolerance = 1e-4 if is_wide(dtype) else 2e-2
    return "" if gap <= tolerance * max(1.0, largest) else f"logits that are {gap:.2g} off (of {largest:.2g})"


def gap_in_spreads(expected_LV: Tensor, found_LV: Tensor) -> float:
    """Return the mean root mean square difference, in units of the logits' spread."""
    gap_L = (found_LV.float() - expected_LV.float()).square().mean(dim=-1).sqrt()
    spread_L = expected_LV.float().std(dim=-1, correction=0)
    return float((gap_L / spread_L.clamp(min=1e-6)).mean())
