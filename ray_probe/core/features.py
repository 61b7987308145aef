"""The feature registry: what a baseline may know of a prefix, by name.

Nothing here may depend on the sampled token or on anything after it: that is the law which keeps the baseline from
biasing the gradient (spec section 4). So a feature function sees a `PrefixView`, which holds neither.

Shape suffixes: T tokens, V vocabulary, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_probe.core.policy import Policy
from ray_probe.errors import ConfigError, bad_value


@dataclass(frozen=True)
class PrefixView:
    """All that a feature may look at: the policy at each prefix, its entropy, and how far along the prefix is."""

    policy: Policy
    entropy_T: Tensor
    position_T: Tensor
    cap: int


@dataclass(frozen=True)
class Feature:
    """One entry of the registry: a name, its one-line meaning and the function [T, V] -> [T]."""

    name: str
    meaning: str
    compute: Callable[[PrefixView], Tensor]


def _top1(view: PrefixView) -> Tensor:
    return view.policy.q_TV.amax(dim=-1)


def _margin(view: PrefixView) -> Tensor:
    kept_TV = view.policy.scaled_TV.masked_fill(~view.policy.keep_TV, -torch.inf)
    if kept_TV.shape[-1] < 2:
        return torch.zeros_like(view.entropy_T)
    top_T2 = kept_TV.topk(2, dim=-1).values
    difference_T = top_T2[..., 0] - top_T2[..., 1]
    return torch.where(torch.isfinite(difference_T), difference_T, torch.zeros_like(difference_T))


def _tail_mass(view: PrefixView) -> Tensor:
    """Mass of the full softmax outside S [T]; summed by itself, because 1 - head_mass would cancel."""
    full_TV = torch.softmax(view.policy.scaled_TV, dim=-1)
    return full_TV.masked_fill(view.policy.keep_TV, 0.0).sum(dim=-1)


def _head_mass(view: PrefixView) -> Tensor:
    return 1.0 - _tail_mass(view)


def _two_point_entropy(view: PrefixView) -> Tensor:
    tail_T = _tail_mass(view)
    entropy_T: Tensor = torch.special.entr(tail_T) + torch.special.entr(1.0 - tail_T)
    return entropy_T


def _logit_var(view: PrefixView) -> Tensor:
    kept_TV = view.policy.scaled_TV.masked_fill(view.policy.q_TV == 0, 0.0)
    mean_T1 = (view.policy.q_TV * kept_TV).sum(dim=-1, keepdim=True)
    return (view.policy.q_TV * (kept_TV - mean_T1).square()).sum(dim=-1)


REGISTRY: dict[str, Feature] = {
    feature.name: feature
    for feature in (
        Feature("H", "entropy of q, nats", lambda view: view.entropy_T),
        Feature("top1", "largest probability in q", _top1),
        Feature(
            "margin", "difference of the two largest kept logits over temperature, nats; 0 if one is kept", _margin
        ),
        Feature("head_mass", "mass of the full softmax inside the nucleus", _head_mass),
        Feature("two_point_entropy", "entropy of (head_mass, 1 - head_mass), nats", _two_point_entropy),
        Feature("logit_var", "variance of the scaled logits under q, nats^2", _logit_var),
        Feature(
            "pos_frac",
            "position over max_new_tokens (the realised length would bias the gradient)",
            lambda view: view.position_T.to(view.entropy_T.dtype) / view.cap,
        ),
    )
}
DEFAULT_FEATURES: tuple[str, ...] = tuple(REGISTRY)


def compute_features(names: Sequence[str], view: PrefixView) -> Tensor:
    """The named features, in the order asked for [T, D], detached. Raises ConfigError for an unknown name."""
    for name in names:
        if name not in REGISTRY:
            raise ConfigError(bad_value("estimator.baseline.features", name, f"known: {', '.join(REGISTRY)}"))
    with torch.no_grad():
        return torch.stack([REGISTRY[name].compute(view) for name in names], dim=-1)
