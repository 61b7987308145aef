"""Scores of tokens from the summaries of their rows: what logits and the fused head have in common.

Shape suffixes: T tokens, V vocabulary, D features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_probe.core.features import PrefixView, compute_features
from ray_probe.core.row_summary import RowSummary
from ray_probe.core.scaling import SamplingRule, scaled
from ray_probe.core.slopes import LogitGradient, token_log_norm


@dataclass(frozen=True)
class ScoringSpec:
    """The policy's rule, the names of the features, and the cap that `pos_frac` divides by."""

    rule: SamplingRule
    features: tuple[str, ...]
    cap: int


@dataclass(frozen=True)
class Scores:
    """Scored tokens, with what backward needs of their rows."""

    log_q_T: Tensor
    entropy_T: Tensor
    outside_T: Tensor
    features_TD: Tensor
    token_scaled_T: Tensor
    summary: RowSummary

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What autograd gives out: log q(Y), H, outside, features."""
        return self.log_q_T, self.entropy_T, self.outside_T, self.features_TD


def scores_from(summary: RowSummary, logit_T: Tensor, position_T: Tensor, spec: ScoringSpec) -> Scores:
    """Scores of tokens with these raw logits [T], from the summaries of their rows."""
    token_scaled_T = scaled(logit_T, summary.largest_T, spec.rule.temperature)
    outside_T = (token_scaled_T < summary.threshold_T) | (token_scaled_T == -torch.inf)
    token_scaled_T = token_scaled_T.double()
    log_q_T = token_scaled_T - token_log_norm(summary.log_norm_T, token_scaled_T, outside_T)
    view = PrefixView(summary, summary.entropy_T, position_T, spec.cap)
    names = spec.features
    features_TD = compute_features(names, view) if names else log_q_T.new_empty((len(log_q_T), 0))
    log_q_T, entropy_T, features_TD = (x.to(logit_T.dtype) for x in (log_q_T, summary.entropy_T, features_TD))
    return Scores(log_q_T, entropy_T, outside_T, features_TD, token_scaled_T, summary)


def to_save(scores: Scores) -> tuple[Tensor, ...]:
    """What backward needs of each token, to be kept for it; `gradient_from` takes it back."""
    return scores.outside_T, scores.token_scaled_T, *scores.summary.columns


def gradient_from(
    saved: Sequence[Tensor], rule: SamplingRule, tokens_T: Tensor, gradients: Sequence[Tensor]
) -> LogitGradient:
    """The gradient's numbers from what was saved and the gradients of log q and H."""
    outside_T, token_scaled_T, *columns = saved
    summary = RowSummary(*columns)
    return LogitGradient.of(rule, summary, tokens_T, token_scaled_T, outside_T, gradients[0], gradients[1])


def refuse_second_derivative() -> None:
    """Raise where autograd asks for a graph of backward itself."""
    if torch.is_grad_enabled():
        raise NotImplementedError("token statistics have no second derivative: call backward without create_graph")
