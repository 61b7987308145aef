"""The features of a prefix that a baseline may read, by name.

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


@dataclass(frozen=True)
class Feature:
    """An entry of the registry: a name, its meaning and the function of [T]."""

    name: str
    meaning: str
    compute: Callable[[PrefixView], Tensor]


def _two_point_entropy(view: PrefixView) -> Tensor:
    tail_T = view.policy.tail_mass_T
    entropy_T: Tensor = torch.special.entr(tail_T) + torch.special.entr(1.0 - tail_T)
    return entropy_T


REGISTRY: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature("H", "entropy of q, nats", lambda view: view.entropy_T),
        Feature("top1", "largest probability in q", lambda view: view.policy.top1_T),
        Feature(
            "margin",
            "difference of the two largest kept logits over temperature, nats; 0 if one is kept",
            lambda view: view.policy.margin_T,
        ),
        Feature("head_mass", "mass of the full softmax inside the nucleus", lambda view: 1.0 - view.policy.tail_mass_T),
        Feature("two_point_entropy", "entropy of (head_mass, 1 - head_mass), nats", _two_point_entropy),
        Feature("logit_var", "variance of the scaled logits under q, nats^2", lambda view: view.policy.logit_var_T),
        Feature(
            "pos_frac",
            "position over max_new_tokens (the realised length would bias the gradient)",
            lambda view: view.position_T.to(view.entropy_T.dtype) / view.cap,
        ),
    )
}
DEFAULT_FEATURES: tuple[str, ...] = tuple(REGISTRY)


def compute_features(names: Sequence[str], view: PrefixView) -> Tensor:
    """Return the named features in order [T, D], detached.

    Raises ConfigError for an unknown name.
    """
    for name in names:
        if name not in REGISTRY:
            raise ConfigError(bad_value("estimator.baseline.features", name, f"known: {', '.join(REGISTRY)}"))
    with torch.no_grad():
        return torch.stack([REGISTRY[name].compute(view) for name in names], dim=-1)
