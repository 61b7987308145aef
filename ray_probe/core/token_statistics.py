"""log q(Y), entropy and features of a block of tokens, forward and backward, in row chunks.

Beyond the logits themselves (and, backward, their gradient) no [T, V] table is held: each chunk of rows is turned into
its statistics and dropped, and backward goes by the nucleus' saved threshold: to the few kept tokens of a narrow
nucleus, else through the vocabulary tile by tile.

Shape suffixes: R rows of the logits, T rows that are scored, V vocabulary, D features, M kept tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ray_probe.core.blocks import Blocks
from ray_probe.core.policy import row_chunks, sample_summaries
from ray_probe.core.scaling import SamplingRule, Workspace, tiles, widened
from ray_probe.core.scoring import Question, refuse_second_derivative, scores_from, slopes_from, to_save
from ray_probe.core.slopes import Slopes
from ray_probe.core.summaries import RowSummary, fill

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


class _Statistics(torch.autograd.Function):
    """(logits, rows, tokens) -> (log q(Y), H, outside, features); gradients through the first two."""

    @staticmethod
    def forward(
        ctx: Any, logits_RV: Tensor, rows_T: Tensor, tokens_T: Tensor, position_T: Tensor, question: Question
    ) -> tuple[Tensor, ...]:
        ctx.selections = list(_selections(rows_T, logits_RV))
        dtype, space = torch.promote_types(logits_RV.dtype, torch.float32), Workspace()
        summary = RowSummary.empty(len(tokens_T), dtype, logits_RV.device)
        for chunk, rows in ctx.selections:
            fill(summary[chunk], widened(logits_RV[rows]), question.rule, space)
        scores = scores_from(summary, logits_RV[rows_T, tokens_T].to(dtype), position_T, question)
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
        kept, space = kept_T.tolist(), Workspace()
        for chunk, rows in ctx.selections:
            narrow = NARROW_SHARE * sum(kept[chunk]) <= len(kept[chunk]) * logits_RV.shape[-1]
            if narrow:
                _add_kept(grad_RV, rows, widened(logits_RV[rows]), slopes[chunk], space)
            else:
                _add_tiles(grad_RV, rows, widened(logits_RV[rows]), slopes[chunk], space)
        return grad_RV, None, None, None, None


Rows = slice | Tensor


def _selections(rows_T: Tensor, logits_RV: Tensor) -> Iterator[tuple[slice, Rows]]:
    """Chunks of the scored rows, and where each lies in the logits: a slice, which costs no copy, where it can be."""
    numbers = rows_T.tolist()
    for chunk in row_chunks(len(numbers), logits_RV.shape[-1], logits_RV.device):
        part = numbers[chunk]
        run = part == list(range(part[0], part[0] + len(part)))
        yield chunk, slice(part[0], part[0] + len(part)) if run else rows_T[chunk]


def _add_kept(grad_RV: Tensor, rows: Rows, logits_TV: Tensor, slopes: Slopes, space: Workspace) -> None:
    """Add the gradient of rows with narrow nuclei, which is 0 everywhere but at the kept tokens and at Y."""
    kept = Blocks(logits_TV, space).kept(slopes.largest_T, slopes.threshold_T, slopes.rule.temperature)
    alone_N, own_N = slopes.of_outside()
    row_M, column_M = torch.cat([kept[0], alone_N]), torch.cat([kept[1], slopes.tokens_T[alone_N]])
    row_M = row_M + rows.start if isinstance(rows, slice) else rows[row_M]
    value_M = torch.cat([slopes.of_kept(*kept), own_N]).to(grad_RV.dtype)
    grad_RV.index_put_((row_M, column_M), value_M, accumulate=True)


def _add_tiles(grad_RV: Tensor, rows: Rows, logits_TV: Tensor, slopes: Slopes, space: Workspace) -> None:
    """Add the gradient of rows with wide nuclei, tile by tile."""
    for tile in tiles(len(logits_TV), logits_TV.shape[-1], logits_TV.device):
        value_TW = slopes.tile(logits_TV[:, tile], tile.start, space).to(grad_RV.dtype)
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


@torch.no_grad()
def sample_statistics(
    logits_TV: Tensor,
    uniform_T: Tensor,
    position_T: Tensor,
    rule: SamplingRule,
    cap: int,
    features: Sequence[str] = (),
) -> tuple[Tensor, TokenStatistics]:
    """Sample a token a row, and score it by the same search for the nucleus.

    Args:
        logits_TV: raw logits [T, V].
        uniform_T: float64 [T] in [0, 1), one number a row that belongs to the row's response.
        position_T: see `token_statistics`, as are the next three.
        rule: temperature and top_p.
        cap: max_new_tokens.
        features: names.

    Returns:
        tokens [T] int64, as `sample_rows` draws them, and what `token_statistics` says of them.
    """
    tokens_T, _, summary = sample_summaries(logits_TV, rule, uniform_T)
    logit_T = widened(logits_TV.gather(-1, tokens_T.unsqueeze(-1)).squeeze(-1))
    scores = scores_from(summary, logit_T, position_T, Question(rule, tuple(features), cap))
    features_TD = scores.features_TD if features else None
    return tokens_T, TokenStatistics(scores.log_q_T, scores.entropy_T, scores.outside_T, features_TD)
