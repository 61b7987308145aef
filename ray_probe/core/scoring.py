"""Scores of tokens from the summaries of their rows: what logits and the fused head have in common.

Shape suffixes: T tokens, V vocabulary, D features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ray_probe.core.features import PrefixView, compute_features
from ray_probe.core.nucleus import Candidates
from ray_probe.core.scaling import SamplingRule, Workspace, scaled
from ray_probe.core.slopes import Slopes, token_log_norm
from ray_probe.core.summaries import RowSummary, concatenated, summarize


@dataclass(frozen=True)
class Question:
    """What is asked of each row besides the policy's rule: names of features, and the cap that `pos_frac` takes."""

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


def score(
    logits_TV: Tensor, tokens_T: Tensor, position_T: Tensor, question: Question, space: Workspace,
    use: Callable[[Candidates], None] = lambda group: None,
) -> Scores:  # fmt: skip
    """Score one token a row of a chunk of logits (float32 or wider); `use` sees the nuclei as they are found."""
    summary = summarize(logits_TV, question.rule, space, use)
    return scores_from(summary, logits_TV.gather(-1, tokens_T.unsqueeze(-1)).squeeze(-1), position_T, question)


def scores_from(summary: RowSummary, logit_T: Tensor, position_T: Tensor, question: Question) -> Scores:
    """Scores of tokens with these raw logits [T], from the summaries of their rows."""
    token_scaled_T = scaled(logit_T, summary.largest_T, question.rule.temperature)
    outside_T = (token_scaled_T < summary.threshold_T) | (token_scaled_T == -torch.inf)
    token_scaled_T = token_scaled_T.double()
    log_q_T = token_scaled_T - token_log_norm(summary.log_norm_T, token_scaled_T, outside_T)
    view = PrefixView(summary, summary.entropy_T, position_T, question.cap)
    names = question.features
    features_TD = compute_features(names, view) if names else log_q_T.new_empty((len(log_q_T), 0))
    log_q_T, entropy_T, features_TD = (x.to(logit_T.dtype) for x in (log_q_T, summary.entropy_T, features_TD))
    return Scores(log_q_T, entropy_T, outside_T, features_TD, token_scaled_T, summary)


def joined(parts: Sequence[Scores]) -> Scores:
    """Scores of several chunks as one."""
    rows = ((*part.outputs, part.token_scaled_T) for part in parts)
    log_q_T, entropy_T, outside_T, features_TD, token_scaled_T = (torch.cat(x) for x in zip(*rows, strict=True))
    summary = concatenated([part.summary for part in parts])
    return Scores(log_q_T, entropy_T, outside_T, features_TD, token_scaled_T, summary)


def to_save(scores: Scores) -> tuple[Tensor, ...]:
    """What backward needs of each token, to be kept for it; `slopes_from` takes it back."""
    summary = tuple(getattr(scores.summary, field.name) for field in fields(RowSummary))
    return scores.outside_T, scores.token_scaled_T, *summary


def slopes_from(
    saved: Sequence[Tensor], rule: SamplingRule, tokens_T: Tensor, gradients: Sequence[Tensor]
) -> tuple[Slopes, Tensor]:
    """The gradient's numbers from what was saved and the gradients of log q and H; and the sizes of the nuclei."""
    outside_T, token_scaled_T, *columns = saved
    summary = RowSummary(*columns)
    slopes = Slopes.of(rule, summary, tokens_T, token_scaled_T, outside_T, gradients[0], gradients[1])
    return slopes, summary.kept_T


def refuse_second_derivative() -> None:
    """Raise where autograd asks for a graph of backward itself."""
    if torch.is_grad_enabled():
        raise NotImplementedError("token statistics have no second derivative: call backward without create_graph")
