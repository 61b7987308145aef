"""log q(Y), entropy and features of a block of tokens, forward and backward, in row chunks.

Beyond the logits themselves (and, backward, their gradient) no [T, V] table is held: each chunk of rows is turned into
its statistics and dropped. A narrow nucleus leaves its tokens and their scaled logits for backward, which goes to them
alone; of a wide one it goes through the vocabulary tile by tile, by the saved threshold.

Shape suffixes: R rows of the logits, T rows that are scored, V vocabulary, D features, M kept tokens.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ray_probe.core.kept import NARROW_SHARE, NucleusCollector
from ray_probe.core.nucleus import Candidates
from ray_probe.core.policy import row_chunks, sample_summaries
from ray_probe.core.row_summary import RowSummary
from ray_probe.core.scaling import SamplingRule, tiles, widened
from ray_probe.core.scoring import ScoringSpec, gradient_from, refuse_second_derivative, scores_from, to_save
from ray_probe.core.slopes import LogitGradient, TileScratch
from ray_probe.core.summarize import SummaryScratch, fill

NARROW = 512  # tokens that a nucleus leaves for backward at most, about, and no more than one in 16 of the vocabulary
_PIECE = 1 << 14  # kept tokens at a time


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
        ctx: Any, logits_RV: Tensor, rows_T: Tensor, tokens_T: Tensor, position_T: Tensor, spec: ScoringSpec
    ) -> tuple[Tensor, ...]:
        dtype, scratch = torch.promote_types(logits_RV.dtype, torch.float32), SummaryScratch()
        summary = RowSummary.empty(len(tokens_T), dtype, logits_RV.device)
        vocabulary = logits_RV.shape[-1]
        share = max(NARROW_SHARE, vocabulary // NARROW)
        collector = NucleusCollector(vocabulary, logits_RV.device, share, has_bits=False)
        collect = ctx.needs_input_grad[0]
        for chunk, rows in _selections(rows_T, logits_RV):
            use = partial(collector.add, chunk.start) if collect else _ignore
            fill(summary[chunk], widened(logits_RV[rows]), spec.rule, scratch, use)
        scores = scores_from(summary, logits_RV[rows_T, tokens_T].to(dtype), position_T, spec)
        if collect:
            nuclei, ctx.rule = collector.kept(), spec.rule
            wide_N = torch.arange(len(tokens_T), device=rows_T.device) if spec.rule.top_p >= 1.0 else nuclei.wide_N
            ctx.save_for_backward(logits_RV, rows_T, tokens_T, *nuclei.tensors[:3], wide_N, *to_save(scores))
        ctx.mark_non_differentiable(scores.outside_T, scores.features_TD)
        return scores.outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        logits_RV, rows_T, tokens_T, row_M, column_M, scaled_M, wide_N, *saved = ctx.saved_tensors
        gradient = gradient_from(saved, ctx.rule, tokens_T, gradients)
        grad_RV = torch.zeros_like(logits_RV, memory_format=torch.contiguous_format)
        _add_kept(grad_RV, rows_T, (row_M, column_M, scaled_M), gradient)
        _add_alone(grad_RV, rows_T, wide_N, gradient)
        _add_tiles(grad_RV, rows_T, wide_N, logits_RV, gradient)
        return grad_RV, None, None, None, None


def _ignore(group: Candidates) -> None:
    """Nothing is kept of the nuclei when no gradient will be asked for."""


Rows = slice | Tensor


def _selections(rows_T: Tensor, logits_RV: Tensor) -> Iterator[tuple[slice, Rows]]:
    """Chunks of the scored rows, and where each lies in the logits: a slice, which costs no copy, where it can be."""
    numbers = rows_T.tolist()
    for chunk in row_chunks(len(numbers), logits_RV.shape[-1], logits_RV.device):
        part = numbers[chunk]
        run = part == list(range(part[0], part[0] + len(part)))
        yield chunk, slice(part[0], part[0] + len(part)) if run else rows_T[chunk]


def _add_kept(grad_RV: Tensor, rows_T: Tensor, kept: tuple[Tensor, Tensor, Tensor], gradient: LogitGradient) -> None:
    """Add the gradient of narrow nuclei, which is 0 everywhere but at their tokens (row, token, scaled logit) [M]."""
    for row_P, column_P, scaled_P in zip(*(torch.split(column, _PIECE) for column in kept), strict=True):
        row_P, column_P = row_P.long(), column_P.long()
        value_P = gradient.kept(row_P, column_P, scaled_P).to(grad_RV.dtype)
        grad_RV.index_put_((rows_T[row_P], column_P), value_P, accumulate=True)


def _add_alone(grad_RV: Tensor, rows_T: Tensor, wide_N: Tensor, gradient: LogitGradient) -> None:
    """Add the gradient of Y where it lies outside a narrow nucleus."""
    narrow_T = torch.ones_like(gradient.outside_T).index_fill_(0, wide_N, False)
    alone_N = (gradient.outside_T & narrow_T).nonzero().squeeze(-1)
    place = rows_T[alone_N], gradient.tokens_T[alone_N]
    grad_RV.index_put_(place, gradient.own_T[alone_N].to(grad_RV.dtype), accumulate=True)


def _add_tiles(grad_RV: Tensor, rows_T: Tensor, wide_N: Tensor, logits_RV: Tensor, gradient: LogitGradient) -> None:
    """Add the gradient of wide nuclei, tile by tile."""
    scratch, vocabulary, device = TileScratch(), logits_RV.shape[-1], logits_RV.device
    for chunk, rows in _selections(rows_T[wide_N], logits_RV):
        own = gradient[wide_N[chunk]]
        for tile in tiles(len(own.tokens_T), vocabulary, device):
            logits_RW, grad_RW = logits_RV[:, tile], grad_RV[:, tile]
            value_NW = own.tile(widened(logits_RW[rows]), tile.start, scratch).to(grad_RV.dtype)
            if isinstance(rows, slice):
                grad_RW[rows].add_(value_NW)
            else:
                grad_RW.index_add_(0, rows, value_NW)


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
    spec = ScoringSpec(rule, tuple(features), cap)
    outputs = _Statistics.apply(logits_RV, rows_T, tokens_T, position_T, spec)  # type: ignore[no-untyped-call]
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
    scratch: SummaryScratch | None = None,
) -> tuple[Tensor, TokenStatistics]:
    """Sample a token a row, and score it by the same search for the nucleus.

    Args:
        logits_TV: raw logits [T, V].
        uniform_T: float64 [T] in [0, 1), one number a row that belongs to the row's response.
        position_T: see `token_statistics`, as are the next three.
        rule: temperature and top_p.
        cap: max_new_tokens.
        features: names.
        scratch: memory for tables, which a caller who comes again and again may keep.

    Returns:
        tokens [T] int64, as `sample_rows` draws them, and what `token_statistics` says of them.
    """
    tokens_T, _, summary = sample_summaries(logits_TV, rule, uniform_T, scratch)
    logit_T = widened(logits_TV.gather(-1, tokens_T.unsqueeze(-1)).squeeze(-1))
    scores = scores_from(summary, logit_T, position_T, ScoringSpec(rule, tuple(features), cap))
    features_TD = scores.features_TD if features else None
    return tokens_T, TokenStatistics(scores.log_q_T, scores.entropy_T, scores.outside_T, features_TD)
