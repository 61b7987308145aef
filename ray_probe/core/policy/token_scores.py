"""Scores tokens from rows of logits, forward and backward, whatever the logits are made from.

A source gives the logits for a few rows, or a few columns, at a time, and takes their gradient the same way: so beyond
what the source itself holds there is no [T, V] table. With `top_p < 1` the gradient is 0 outside the nuclei. A narrow
nucleus keeps its tokens and their scaled logits for backward, which touches these tokens alone. For a wide nucleus,
and for `top_p = 1`, backward asks the source for the logits again, tile by tile of the vocabulary.

Shape suffixes: T tokens, V vocabulary, D features, N some rows, W columns of a tile, M kept tokens of all rows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from ray_probe.core.policy.features import PrefixView, compute_features
from ray_probe.core.policy.full_vocabulary import BLOCK, Moments
from ray_probe.core.policy.kept_nuclei import KeptNuclei, NucleusCollector
from ray_probe.core.policy.logit_gradient import LogitGradient, TileScratch, token_log_norm
from ray_probe.core.policy.logits import SamplingRule, scaled, tiles, widened
from ray_probe.core.policy.row_summary import RowSummary
from ray_probe.core.policy.sampling import row_chunks
from ray_probe.core.policy.summarize import SummaryScratch, fill

PIECE = 1 << 16  # kept tokens whose gradient is computed at once
Rows = slice | Tensor


@dataclass(frozen=True)
class ScoringSpec:
    """The policy's rule, the names of the features, and the cap that `pos_frac` divides by."""

    rule: SamplingRule
    features: tuple[str, ...]
    cap: int


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """Scores of T tokens, with the numbers and nuclei of their rows that backward needs.

    Attributes:
        log_q_T: log q(Y), nats.
        entropy_T: H, nats.
        outside_T: bool, Y lies outside the nucleus.
        features_TD: features, without a column where none were asked for.
        token_scaled_T: scaled logit of Y, float64, nats.
        summary: of the rows.
        nuclei: None for `top_p = 1`, where every token is kept, and where the nuclei were not collected.
    """

    log_q_T: Tensor
    entropy_T: Tensor
    outside_T: Tensor
    features_TD: Tensor
    token_scaled_T: Tensor
    summary: RowSummary
    nuclei: KeptNuclei | None = None

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """Outputs of the autograd function: log q(Y), H, outside, features."""
        return self.log_q_T, self.entropy_T, self.outside_T, self.features_TD

    @property
    def for_backward(self) -> tuple[Tensor, ...]:
        """Tensors that backward needs."""
        kept = () if self.nuclei is None else self.nuclei.tensors
        return self.outside_T, self.token_scaled_T, *self.summary.columns, *kept

    @property
    def bytes(self) -> int:
        """Memory of all tensors."""
        return sum(tensor.nbytes for tensor in (*self.outputs, *self.for_backward))


class GradientSink(Protocol):
    """Takes the gradient by a source's logits and turns it into that by the source's tensors."""

    def add_kept(self, row_M: Tensor, column_M: Tensor, grad_M: Tensor, logit_M: Tensor) -> None:
        """Add a gradient that is 0 but at these tokens (row, column); it may overwrite `grad_M`."""

    def add_tile(self, rows: Rows, columns: slice, grad_NW: Tensor, logits_NW: Tensor) -> None:
        """Add a gradient by the logits of some rows and columns; it may overwrite `grad_NW`."""

    def results(self) -> Sequence[Tensor | None]:
        """Return the gradient by each of the source's tensors."""


class LogitSource(Protocol):
    """Gives rows of raw logits, one for each scored token.

    Attributes:
        shape: scored tokens T and vocabulary V.
        dtype: of the logits.
        multiple: divides the width of every tile in backward, but that of the last.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    multiple: int

    def blocks(self, picked_N: Tensor | None, whole: bool) -> Iterator[tuple[slice, Rows]]:
        """Yield blocks of rows to work on at once: their places among the picked rows, and their name for `logits`.

        Args:
            picked_N: int64, the rows to go through; None: all.
            whole: the logits of whole rows will be asked for, not those of a tile.
        """

    def logits(self, rows: Rows, columns: slice) -> Tensor:
        """Return the logits of a block's rows and some columns [N, W]; valid until the next call."""

    def collector(self) -> NucleusCollector:
        """Return a new collector of the nuclei that backward needs."""

    def sink(self, needed: Sequence[bool]) -> GradientSink:
        """Return a new sink; `needed` says which of the source's tensors need a gradient."""


def scores_from(
    summary: RowSummary, logit_T: Tensor, position_T: Tensor, spec: ScoringSpec, nuclei: KeptNuclei | None = None
) -> ScoredTokens:
    """Return the scores of tokens with these raw logits [T], given the summaries of their rows."""
    token_scaled_T = scaled(logit_T, summary.largest_T, spec.rule.temperature)
    outside_T = (token_scaled_T < summary.threshold_T) | (token_scaled_T == -torch.inf)
    token_scaled_T = token_scaled_T.double()
    log_q_T = token_scaled_T - token_log_norm(summary.log_norm_T, token_scaled_T, outside_T)
    view, names = PrefixView(summary, summary.entropy_T, position_T, spec.cap), spec.features
    features_TD = compute_features(names, view) if names else log_q_T.new_empty((len(log_q_T), 0))
    log_q_T, entropy_T, features_TD = (x.to(logit_T.dtype) for x in (log_q_T, summary.entropy_T, features_TD))
    return ScoredTokens(log_q_T, entropy_T, outside_T, features_TD, token_scaled_T, summary, nuclei)


def search(
    source: LogitSource, tokens_T: Tensor, position_T: Tensor, spec: ScoringSpec, collect: bool
) -> ScoredTokens:  # fmt: skip
    """Score tokens without graph.

    Args:
        source: gives the logits.
        tokens_T: int64 [T], the tokens Y.
        position_T: int64 [T], position j of each token in its response, from 0.
        spec: rule, features and cap.
        collect: keep the nuclei, for backward.
    """
    summary = RowSummary.empty(len(tokens_T), torch.promote_types(source.dtype, torch.float32), tokens_T.device)
    logit_T = torch.empty_like(summary.largest_T)
    collector = source.collector() if collect and spec.rule.top_p < 1.0 else None
    if spec.rule.top_p < 1.0:
        _read_rows(source, tokens_T, spec.rule, summary, logit_T, collector)
    else:
        _read_tiles(source, tokens_T, spec.rule, summary, logit_T)
    return scores_from(summary, logit_T, position_T, spec, None if collector is None else collector.kept())


def _read_rows(
    source: LogitSource, tokens_T: Tensor, rule: SamplingRule, summary: RowSummary, logit_T: Tensor,
    collector: NucleusCollector | None,
) -> None:  # fmt: skip
    """Fill the summary and the tokens' logits from whole rows, and collect the nuclei."""
    vocabulary, scratch = source.shape[1], SummaryScratch()
    for block, rows in source.blocks(None, whole=True):
        logits_NV = source.logits(rows, slice(0, vocabulary))
        logit_T[block] = logits_NV.gather(-1, tokens_T[block].unsqueeze(-1)).squeeze(-1)
        for chunk in row_chunks(len(logits_NV), vocabulary, logits_NV.device):
            part = slice(block.start + chunk.start, block.start + chunk.stop)
            use = None if collector is None else partial(collector.add, part.start)
            fill(summary[part], widened(logits_NV[chunk]), rule, scratch, use)


def _read_tiles(
    source: LogitSource, tokens_T: Tensor, rule: SamplingRule, summary: RowSummary, logit_T: Tensor
) -> None:  # fmt: skip
    """Fill the summary and the tokens' logits for `top_p = 1`, from tiles of the vocabulary."""
    scratch = SummaryScratch().moments
    for block, rows in source.blocks(None, whole=False):
        moments, own_N = Moments(rule.temperature, scratch), tokens_T[block]
        for tile in tiles(len(own_N), source.shape[1], own_N.device, BLOCK):
            logits_NW = widened(source.logits(rows, tile))
            moments.add(logits_NW)
            inside_N1 = (own_N - tile.start).clamp(0, logits_NW.shape[-1] - 1).unsqueeze(-1)
            here_N = logits_NW.gather(-1, inside_N1).squeeze(-1)
            logit_T[block] = torch.where(own_N >= tile.start, here_N, logit_T[block])
        summary[block] = moments.summary()


def score_tokens(
    make_source: Callable[..., LogitSource], tensors: Sequence[Tensor], tokens_T: Tensor, position_T: Tensor,
    spec: ScoringSpec, cached: ScoredTokens | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Score tokens, with graph from log q(Y) and H to the tensors of a source.

    Args:
        make_source: makes the source from `tensors`; it lives as long as the graph, so it holds no activations.
        tensors: the source's tensors.
        tokens_T: see `search`, as are the next two.
        position_T: int64 [T].
        spec: rule, features and cap.
        cached: an earlier result of `search` for the same arguments, which then computes nothing; None: search.

    Returns:
        log q(Y), H, outside, features.
    """
    collect = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    arguments = make_source, tokens_T, position_T, spec, collect, cached
    outputs: tuple[Tensor, ...] = _ScoreTokens.apply(*arguments, *tensors)  # type: ignore[no-untyped-call]
    return outputs


class _ScoreTokens(torch.autograd.Function):
    """(tensors of a source) -> (log q(Y), H, outside, features); gradients through the first two."""

    @staticmethod
    def forward(
        ctx: Any, make_source: Callable[..., LogitSource], tokens_T: Tensor, position_T: Tensor, spec: ScoringSpec,
        collect: bool, cached: ScoredTokens | None, *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        scored = cached or search(make_source(*tensors), tokens_T, position_T, spec, collect)
        if collect:
            ctx.make_source, ctx.rule, ctx.inputs = make_source, spec.rule, len(tensors)
            ctx.save_for_backward(*tensors, tokens_T, *scored.for_backward)
        outputs = tuple(output.clone() for output in scored.outputs)  # autograd marks them; cached ones stay unmarked
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
    """Add the gradient of rows with narrow nuclei, by their kept tokens and by each Y outside."""

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
    """Add the gradient of rows with wide nuclei, or of all rows for None, tile by tile."""
    picked_N, scratch = None if nuclei is None else nuclei.wide_N, TileScratch()
    for block, rows in source.blocks(picked_N, whole=False):
        own = gradient[block if picked_N is None else picked_N[block]]
        for tile in tiles(len(own.tokens_T), source.shape[1], own.tokens_T.device, source.multiple):
            logits_NW = widened(source.logits(rows, tile))
            keep_NW = None if nuclei is None else nuclei.keep(block, tile)
            sink.add_tile(rows, tile, own.tile(logits_NW, tile.start, scratch, keep_NW), logits_NW)
