"""Token statistics straight from hidden states: the head's logits exist for a few rows, or a few columns, at a time.

With `top_p < 1` the gradient is 0 outside the nuclei, so one product of matrices is all that it takes: a narrow nucleus
leaves its tokens and their scaled logits for backward, which touches those rows of the head's weight alone. A wide
nucleus leaves one bit a token of the vocabulary, and its logits are computed again, as all are for `top_p = 1`, tile
by tile of the vocabulary.

What a pass without graph has found can be kept for one with it, whose forward half is then nothing: no product with the
head, no search. Its hidden states must be those of the first pass.

Shape suffixes: T tokens, V vocabulary, W columns of a tile, D hidden size, N some rows, M kept tokens of all rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ray_probe.core.full_vocabulary import BLOCK, Moments, MomentScratch
from ray_probe.core.head import Adapter, Head, HeadGradient, Products
from ray_probe.core.kept import KeptNuclei, NucleusCollector
from ray_probe.core.nucleus import Candidates
from ray_probe.core.policy import row_chunks
from ray_probe.core.row_summary import RowSummary
from ray_probe.core.scaling import Buffer, SamplingRule, tiles, widened
from ray_probe.core.scoring import (
    Scores,
    ScoringSpec,
    gradient_from,
    refuse_second_derivative,
    scores_from,
    to_save,
)
from ray_probe.core.slopes import LogitGradient, TileScratch
from ray_probe.core.summarize import SummaryScratch, fill
from ray_probe.core.token_statistics import TokenStatistics

__all__ = ["Adapter", "Found", "Head", "find", "fused_token_statistics"]

BLOCK_ELEMENTS = 9_000_000  # logits of a block of whole rows
_LARGER_ON_A_GPU = 4
_LEAST_ROWS = 8
_MOST_ROWS = {"cpu": 256, "cuda": 4096}  # of a block whose logits are computed tile by tile
_PIECE = 1 << 16  # kept tokens at a time


@dataclass(frozen=True, eq=False)
class Found:
    """What is known of some tokens: their scores, and `KeptNuclei.tensors` of their nuclei (empty for `top_p = 1`)."""

    scores: Scores
    kept: tuple[Tensor, ...]

    @property
    def bytes(self) -> int:
        """Memory that it takes."""
        return sum(tensor.nbytes for tensor in (*self.scores.outputs, *to_save(self.scores), *self.kept))


class _FusedHead(torch.autograd.Function):
    """(hidden states, weights, bias) -> (log q(Y), H, outside, features); gradients through the first two."""

    @staticmethod
    def forward(
        ctx: Any, tokens_T: Tensor, position_T: Tensor, spec: ScoringSpec, head: Head, collect: bool,
        found: Found | None, *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        if found is None:
            found = _search(Products.from_tensors(head, tensors), tokens_T, position_T, spec, collect)
        if collect:
            ctx.spec, ctx.head, ctx.sizes = spec, head, (len(tensors), len(found.kept))
            ctx.save_for_backward(tokens_T, *tensors, *found.kept, *to_save(found.scores))
        outputs = tuple(output.clone() for output in found.scores.outputs)  # autograd makes them its own
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        tokens_T, *rest = ctx.saved_tensors
        inputs, kept_size = ctx.sizes
        tensors, kept, saved = rest[:inputs], rest[inputs : inputs + kept_size], rest[inputs + kept_size :]
        products = Products.from_tensors(ctx.head, tensors)
        sums = HeadGradient(products, ctx.needs_input_grad[6:], ctx.head.weight_grad_VD)
        gradient = gradient_from(saved, ctx.spec.rule, tokens_T, gradients)
        if kept:
            nuclei = KeptNuclei(*kept)
            _add_narrow(sums, nuclei, gradient)
            _add_tiles(sums, gradient, nuclei.wide_N, nuclei)
        else:
            _add_tiles(sums, gradient, torch.arange(len(tokens_T), device=tokens_T.device), None)
        return None, None, None, None, None, None, *sums.results()


def _search(products: Products, tokens_T: Tensor, position_T: Tensor, spec: ScoringSpec, collect: bool) -> Found:
    forward = _by_tiles if spec.rule.top_p >= 1.0 else _by_rows
    return forward(products, tokens_T, position_T, spec, collect)


def _by_rows(products: Products, tokens_T: Tensor, position_T: Tensor, spec: ScoringSpec, collect: bool) -> Found:
    """Scores from blocks of whole rows, and their nuclei if they are to be collected."""
    rows, vocabulary = products.shape
    device, buffer, scratch = tokens_T.device, Buffer(), SummaryScratch()
    summary, logit_T = _blank(products)
    size = (1 if device.type == "cpu" else _LARGER_ON_A_GPU) * BLOCK_ELEMENTS // vocabulary
    size = max(_LEAST_ROWS, size // _LEAST_ROWS * _LEAST_ROWS)
    collector = NucleusCollector(vocabulary, device)
    for first in range(0, rows, size):
        logits_NV = products.logits(slice(first, first + size), slice(0, vocabulary), buffer)
        for chunk in row_chunks(len(logits_NV), vocabulary, device):
            part = slice(first + chunk.start, first + min(chunk.stop, len(logits_NV)))
            use = partial(collector.add, part.start) if collect else _ignore
            fill(summary[part], widened(logits_NV[chunk]), spec.rule, scratch, use)
        block = slice(first, first + len(logits_NV))
        logit_T[block] = logits_NV.gather(-1, tokens_T[block].unsqueeze(-1)).squeeze(-1)
    return Found(scores_from(summary, logit_T, position_T, spec), collector.kept().tensors if collect else ())


def _blank(products: Products) -> tuple[RowSummary, Tensor]:
    """Room for the summaries of all rows, and for the raw logits of their tokens [T]."""
    weight_VD = products.weights[0]
    dtype = torch.promote_types(weight_VD.dtype, torch.float32)
    summary = RowSummary.empty(products.shape[0], dtype, weight_VD.device)
    return summary, torch.empty_like(summary.largest_T)


def _ignore(group: Candidates) -> None:
    """Nothing is kept of the nuclei when no gradient will be asked for."""


def _by_tiles(products: Products, tokens_T: Tensor, position_T: Tensor, spec: ScoringSpec, collect: bool) -> Found:
    """Scores for `top_p = 1`, from tiles of the vocabulary; nothing is kept, because every token is."""
    rows, vocabulary = products.shape
    buffer, scratch = Buffer(), MomentScratch()
    summary, logit_T = _blank(products)
    for block in _row_blocks(rows, tokens_T.device):
        moments, own_T = Moments(spec.rule.temperature, scratch), tokens_T[block]
        for tile in tiles(len(own_T), vocabulary, own_T.device, BLOCK):
            logits_TW = widened(products.logits(block, tile, buffer))
            moments.add(logits_TW)
            inside_T1 = (own_T - tile.start).clamp(0, logits_TW.shape[-1] - 1).unsqueeze(-1)
            here_T = logits_TW.gather(-1, inside_T1).squeeze(-1)
            logit_T[block] = torch.where(own_T >= tile.start, here_T, logit_T[block])
        summary[block].put(None, moments.summary())
    return Found(scores_from(summary, logit_T, position_T, spec), ())


def _row_blocks(rows: int, device: torch.device) -> Iterator[slice]:
    size = _MOST_ROWS.get(device.type, _MOST_ROWS["cuda"])
    return (slice(first, min(first + size, rows)) for first in range(0, rows, size))


def _add_narrow(sums: HeadGradient, nuclei: KeptNuclei, gradient: LogitGradient) -> None:
    """Add the gradient of rows with narrow nuclei: of their kept tokens, piece by piece, and of Y where it is none."""

    def add(row_M: Tensor, column_M: Tensor, scaled_M: Tensor, slope_M: Tensor) -> None:
        logit_M = scaled_M * gradient.rule.temperature + gradient.largest_T[row_M]
        sums.add_kept(row_M, column_M, sums.products.chain_(slope_M, logit_M))

    for start in range(0, len(nuclei.row_M), _PIECE):
        piece = slice(start, start + _PIECE)
        kept = nuclei.row_M[piece].long(), nuclei.column_M[piece].long(), nuclei.scaled_M[piece]
        add(*kept, gradient.kept(*kept))
    narrow_T = torch.ones_like(gradient.outside_T).index_fill_(0, nuclei.wide_N, False)
    alone_N = (gradient.outside_T & narrow_T).nonzero().squeeze(-1)
    add(alone_N, gradient.tokens_T[alone_N], gradient.token_scaled_T[alone_N], gradient.own_T[alone_N])


def _add_tiles(sums: HeadGradient, gradient: LogitGradient, rows_N: Tensor, nuclei: KeptNuclei | None) -> None:
    """Add the gradient of rows whose logits are computed again, tile by tile."""
    products, buffer, scratch = sums.products, Buffer(), TileScratch()
    for block in _row_blocks(len(rows_N), rows_N.device):
        own_N = rows_N[block]
        own = gradient[own_N]
        for tile in tiles(len(own_N), products.shape[1], own_N.device, BLOCK):
            logits_NW = widened(products.logits(own_N, tile, buffer))
            slope_NW = own.tile(logits_NW, tile.start, scratch, nuclei.keep(block, tile) if nuclei else None)
            sums.add_tile(own_N, tile, products.chain_(slope_NW, logits_NW))


def fused_token_statistics(
    hidden_TD: Tensor,
    head: Head,
    tokens_T: Tensor,
    position_T: Tensor,
    rule: SamplingRule,
    cap: int,
    features: Sequence[str] = (),
    found: Found | None = None,
) -> TokenStatistics:
    """Score tokens under the sampling policy, from the states that the head sees.

    Args:
        hidden_TD: hidden states [T, D] of the positions that predict the tokens, with or without graph, in the
            weight's dtype.
        head: weight, bias, scaling and adapter.
        tokens_T: int64 [T], the sampled tokens Y.
        position_T: int64 [T], position j of each token in its response, from 0.
        rule: temperature and top_p.
        cap: max_new_tokens, the denominator of `pos_frac`.
        features: names from `ray_probe.core.features.REGISTRY`.
        found: what `find` says of the same tokens, whose features are then given; only the graph is made anew.

    Returns:
        what `token_statistics` gives for the head's logits.
    """
    products = Products.of(hidden_TD, head)
    spec = ScoringSpec(rule, tuple(features), cap)
    outputs = _FusedHead.apply(  # type: ignore[no-untyped-call]
        tokens_T, position_T, spec, head, torch.is_grad_enabled(), found, *products.tensors
    )
    return _statistics(*outputs)


@torch.no_grad()
def find(
    hidden_TD: Tensor,
    head: Head,
    tokens_T: Tensor,
    position_T: Tensor,
    rule: SamplingRule,
    cap: int,
    features: Sequence[str] = (),
) -> tuple[TokenStatistics, Found]:
    """`fused_token_statistics` without graph, and what a later call with graph may be told.

    Memory: a few numbers a token, 12 bytes a token of a narrow nucleus, a bit a token of the vocabulary for a wide one.
    """
    spec = ScoringSpec(rule, tuple(features), cap)
    found = _search(Products.of(hidden_TD, head), tokens_T, position_T, spec, collect=True)
    return _statistics(*found.scores.outputs), found


def _statistics(log_q_T: Tensor, entropy_T: Tensor, outside_T: Tensor, features_TD: Tensor) -> TokenStatistics:
    return TokenStatistics(log_q_T, entropy_T, outside_T, features_TD if features_TD.shape[-1] else None)
