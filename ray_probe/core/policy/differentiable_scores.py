"""Scores tokens with graph, as one autograd operation on the tensors of a source.

Shape suffixes: T tokens, N some rows, W columns of a tile, M kept tokens of all rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ray_probe.core.policy.logit_gradient import LogitGradient, TileScratch
from ray_probe.core.policy.logits import tiles, widened
from ray_probe.core.policy.nucleus.kept import KeptNuclei
from ray_probe.core.policy.row_summary import RowSummary
from ray_probe.core.policy.token_scores import GradientSink, LogitSource, ScoredTokens, ScoringSpec, search

PIECE = 1 << 16  # kept tokens whose gradient is computed at once


def score_tokens(
    make_source: Callable[..., LogitSource], tensors: Sequence[Tensor], tokens_T: Tensor, position_T: Tensor,
    spec: ScoringSpec, cached: ScoredTokens | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Score tokens, with graph from log q(Y) and H to the tensors of a source.

    Args:
        make_source: makes the source from `tensors`; it lives as long as the graph, so it must hold no activations.
        tensors: the source's tensors.
        tokens_T: int64 [T], the tokens Y.
        position_T: int64 [T], position j of each token in its response, from 0.
        spec: rule, features and cap.
        cached: the result of `search` for the same arguments, if known.

    Returns:
        log q(Y), H, outside, features.
    """
    collect = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    arguments = make_source, tokens_T, position_T, spec, collect, cached
    outputs: tuple[Tensor, ...] = _ScoreTokens.apply(*arguments, *tensors)  # type: ignore[no-untyped-call]
    return outputs


class _ScoreTokens(torch.autograd.Function):
    """Maps a source's tensors to log q(Y), H (both with gradient), outside, features."""

    @staticmethod
    def forward(
        ctx: Any, make_source: Callable[..., LogitSource], tokens_T: Tensor, position_T: Tensor, spec: ScoringSpec,
        collect: bool, cached: ScoredTokens | None, *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        scored = cached or search(make_source(*tensors), tokens_T, position_T, spec, collect)
        if collect:
            ctx.make_source, ctx.rule, ctx.inputs = make_source, spec.rule, len(tensors)
            ctx.save_for_backward(*tensors, tokens_T, *scored.for_backward)
        # Autograd marks its outputs, and the cached tensors must stay unmarked.
        outputs = tuple(output.clone() for output in scored.outputs)
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("token statistics have no second derivative: call backward without create_graph")
        inputs, columns, saved = ctx.inputs, len(RowSummary.__dataclass_fields__), ctx.saved_tensors
        source, (tokens_T, outside_T, token_scaled_T, *rest) = ctx.make_source(*saved[:inputs]), saved[inputs:]
        summary, nuclei = RowSummary(*rest[:columns]), KeptNuclei(*rest[columns:]) if rest[columns:] else None
        gradient = LogitGradient.of(ctx.rule, summary, tokens_T, token_scaled_T, outside_T, *gradients[:2])
        sink = source.sink(ctx.needs_input_grad[-inputs:])
        if nuclei is not None:
            _add_narrow(sink, nuclei, gradient)
        _add_tiles(sink, source, nuclei, gradient)
        return *(None,) * (len(ctx.needs_input_grad) - inputs), *sink.results()


def _add_narrow(sink: GradientSink, nuclei: KeptNuclei, gradient: LogitGradient) -> None:
    """Add the gradient of narrow rows, by their kept tokens and by each Y outside."""

    def add(row_M: Tensor, column_M: Tensor, scaled_M: Tensor, grad_M: Tensor) -> None:
        sink.add_kept(row_M, column_M, grad_M, scaled_M * gradient.rule.temperature + gradient.largest_T[row_M])

    for start in range(0, len(nuclei.row_M), PIECE):
        piece = slice(start, start + PIECE)
        kept = nuclei.row_M[piece].long(), nuclei.column_M[piece].long(), nuclei.scaled_M[piece]
        add(*kept, gradient.kept(*kept))
    narrow_T = torch.ones_like(gradient.outside_T).index_fill_(0, nuclei.wide_N, False)
    alone_N = (gradient.outside_T & narrow_T).nonzero().squeeze(-1)
    add(alone_N, gradient.tokens_T[alone_N], gradient.token_scaled_T[alone_N], gradient.own_T[alone_N])


def _add_tiles(sink: GradientSink, source: LogitSource, nuclei: KeptNuclei | None, gradient: LogitGradient) -> None:
    """Add the gradient of wide rows (all rows without nuclei), tile by tile."""
    picked_N, scratch = None if nuclei is None else nuclei.wide_N, TileScratch()
    for block, rows in source.blocks(picked_N, whole=False):
        own = gradient[block if picked_N is None else picked_N[block]]
        for tile in tiles(len(own.tokens_T), source.shape[1], own.tokens_T.device, source.multiple):
            logits_NW = widened(source.logits(rows, tile))
            keep_NW = None if nuclei is None else nuclei.keep(block, tile)
            sink.add_tile(rows, tile, own.tile(logits_NW, tile.start, scratch, keep_NW), logits_NW)
