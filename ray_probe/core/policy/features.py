"""The features of a prefix that are made from its logits, by name.

No feature may depend on the sampled token or on a later one, or the baseline would bias the gradient. A feature
function sees a `PrefixView`, which holds neither.

Shape suffixes: T tokens, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_probe.core.policy.row_summary import RowSummary
from ray_probe.errors import ConfigError, bad_value


@dataclass(frozen=True)
class PrefixView:
    """What a feature may read: the policy at each prefix, its entropy, its position."""

    policy: RowSummary
    entropy_T: Tensor
    position_T: Tensor
    cap: int


def _two_point_entropy(view: PrefixView) -> Tensor:
    tail_T = view.policy.tail_mass_T
    entropy_T: Tensor = torch.special.entr(tail_T) + torch.special.entr(1.0 - tail_T)
    return entropy_T


REGISTRY: dict[str, Callable[[PrefixView], Tensor]] = {
    "H": lambda view: view.entropy_T,
    "top1": lambda view: view.policy.top1_T,
    "margin": lambda view: view.policy.margin_T,
    "head_mass": lambda view: 1.0 - view.policy.tail_mass_T,
    "two_point_entropy": _two_point_entropy,
    "logit_var": lambda view: view.policy.logit_var_T,
    "pos_frac": lambda view: view.position_T.to(view.entropy_T.dtype) / view.cap,
}
"""The function of each column of `ray_probe.core.columns` that is made from logits."""
DEFAULT_FEATURES: tuple[str, ...] = tuple(REGISTRY)


def compute_features(names: Sequence[str], view: PrefixView) -> Tensor:
    """Return the named features in order [T, D], detached.

    Raises ConfigError for an unknown name.
    """
    for name in names:
        if name not in REGISTRY:
            raise ConfigError(bad_value("estimator.baseline.features", name, f"known: {', '.join(REGISTRY)}"))
    with torch.no_grad():
        return torch.stack([REGISTRY[name](view) for name in names], dim=-1)
