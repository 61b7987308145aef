"""log q(Y), entropy and features of a block of tokens, forward and backward, in row chunks.

Beyond the logits themselves (and, backward, their gradient) no [T, V] table is held: each chunk of rows is turned into
its statistics and dropped, and backward goes by the nucleus' saved threshold: to the few kept tokens of a narrow
nucleus, else through the vocabulary tile by tile.

Shape suffixes: R rows of the logits, T rows that are scored, V vocabulary, D features, M kept tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ray_probe.core.blocks import Blocks
from ray_probe.core.features import PrefixView, compute_features
from ray_probe.core.nucleus import Candidates
from ray_probe.core.policy import row_chunks
from ray_probe.core.scaling import SamplingRule, Workspace, scaled, tiles, widened
from ray_probe.core.slopes import Slopes, token_log_norm
from ray_probe.core.summaries import RowSummary, concatenated, summarize

NARROW_SHARE = 8  # a nucleus is wide when it holds more than one in so many tokens of the vocabulary


@dataclass(frozen=True)
class TokenStatistics:
    """Statistics of T scored tokens.

    Attributes:
        log_q_T: log q of the tokens, nats, with graph when the logits have one.
        entropy_T: entropy H of q at each prefix, nats, with graph likewise. Of S alone, so it knows nothing of Y.
        outside_T: bool, the token lay outside the recomputed nucleus; its log q is taken in S + {Y}.
        features_TD: detached features, or None when none were asked for.
    """

    log_q_T: Tensor
    entropy_T: Tensor
    outside_T: Tensor
    features_TD: Tensor | None


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
    columns = [
        torch.cat(column) for column in zip(*((*part.outputs, part.token_scaled_T) for part in parts), strict=True)
    ]
    return Scores(*columns, summary=concatenated([part.summary for part in parts]))


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


class _Statistics(torch.autograd.Function):
    """(logits, rows, tokens) -> (log q(Y), H, outside, features); gradients through the first two."""

    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, rows_T: Tensor, tokens_T: Tensor, position_T: Tensor, question: Question
    ) -> tuple[Tensor, ...]:
        ctx.selections = list(_selections(rows_T, logits_RV))
        space = Workspace()
        scores = joined(
            [
                score(widened(logits_RV[rows]), tokens_T[chunk], position_T[chunk], question, space)
                for chunk, rows in ctx.selections
            ]
        )
        ctx.rule = question.rule
        ctx.save_for_backward(logits_RV, tokens_T, *to_save(scores))
        ctx.mark_non_differentiable(scores.outside_T, scores.features_TD)
        return scores.outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        logits_RV, tokens_T, *saved = ctx.saved_tensors
        slopes, kept_T = slopes_from(saved, ctx.rule, tokens_T, gradients)
        grad_RV = torch.zeros_like(logits_RV, memory_format=torch.contiguous_format)
        limit = logits_RV.shape[-1] // NARROW_SHARE
        for (chunk, rows), kept in zip(ctx.selections, _totals(kept_T, ctx.selections), strict=True):
            add = _add_kept if kept <= limit * len(kept_T[chunk]) else _add_tiles
            add(grad_RV, rows, widened(logits_RV[rows]), slopes[chunk])
        return grad_RV, None, None, None, None


Rows = slice | Tensor


def _selections(rows_T: Tensor, logits_RV: Tensor) -> Iterator[tuple[slice, Rows]]:
    """Chunks of the scored rows, and where each lies in the logits: a slice, which costs no copy, where it can be."""
    numbers = rows_T.tolist()
    for chunk in row_chunks(len(numbers), logits_RV.shape[-1], logits_RV.device):
        part = numbers[chunk]
        run = part == list(range(part[0], part[0] + len(part)))
        yield chunk, slice(part[0], part[0] + len(part)) if run else rows_T[chunk]


def _totals(kept_T: Tensor, selections: Sequence[tuple[slice, Rows]]) -> list[int]:
    kept = kept_T.tolist()
    return [sum(kept[chunk]) for chunk, _ in selections]


def _add_kept(grad_RV: Tensor, rows: Rows, logits_TV: Tensor, slopes: Slopes) -> None:
    """Add the gradient of rows with narrow nuclei, which is 0 everywhere but at the kept tokens and at Y."""
    kept = Blocks(logits_TV).kept(slopes.largest_T, slopes.threshold_T, slopes.rule.temperature)
    row_M, column_M, value_M = slopes.entries(*kept)
    row_M = row_M + rows.start if isinstance(rows, slice) else rows[row_M]
    grad_RV.index_put_((row_M, column_M), value_M.to(grad_RV.dtype), accumulate=True)


def _add_tiles(grad_RV: Tensor, rows: Rows, logits_TV: Tensor, slopes: Slopes) -> None:
    """Add the gradient of rows with wide nuclei, tile by tile."""
    for tile in tiles(len(logits_TV), logits_TV.shape[-1], logits_TV.device):
        value_TW = slopes.tile(logits_TV[:, tile], tile.start).to(grad_RV.dtype)
        if isinstance(rows, slice):
            grad_RV[rows, tile].add_(value_TW)
        else:
            grad_RV[:, tile].index_add_(0, rows, value_TW)


def token_statistics(
    logits_RV: Tensor,
    rows_T: Tensor,
    tokens_T: Tensor,
    position_T: Tensor,
    rule: SamplingRule,
    cap: int,
    features: Sequence[str] = (),
) -> TokenStatistics:
    """Score tokens under the sampling policy.

    Args:
        logits_RV: raw logits [R, V], with or without graph.
        rows_T: int64 [T]: the row of `logits_RV` that predicts each token.
        tokens_T: int64 [T], the sampled tokens Y.
        position_T: int64 [T], position j of each token in its response, from 0.
        rule: temperature and top_p.
        cap: max_new_tokens, the denominator of `pos_frac`.
        features: names from `ray_probe.core.features.REGISTRY`.

    Returns:
        float32 (or wider) statistics; source: spec sections 2 to 4.
    """
    question = Question(rule, tuple(features), cap)
    outputs = _Statistics.apply(logits_RV, rows_T, tokens_T, position_T, question)  # type: ignore[no-untyped-call]
    log_q_T, entropy_T, outside_T, features_TD = outputs
    return TokenStatistics(log_q_T, entropy_T, outside_T, features_TD if features else None)
