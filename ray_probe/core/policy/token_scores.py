"""Scores tokens from any source of logits, and collects for backward.

A source gives the logits of a few rows or columns at a time, and takes their gradient in the same way. So no [T, V]
table exists beyond those of the source itself. With `top_p < 1` the gradient is 0 outside the nuclei. A narrow nucleus
keeps its tokens and their scaled logits for backward, which touches only these tokens. For a wide nucleus, and for
`top_p = 1`, backward requests the logits once more, tile by tile of the vocabulary.

Shape suffixes: T tokens, V vocabulary, D features, N some rows, W columns of a tile, M kept tokens of all rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from ray_probe.core.policy.features import PrefixView, compute_features
from ray_probe.core.policy.full_vocabulary import BLOCK, Moments
from ray_probe.core.policy.logit_gradient import token_log_norm
from ray_probe.core.policy.logits import SamplingRule, scaled, tiles, widened
from ray_probe.core.policy.nucleus.kept import KeptNuclei, NucleusCollector
from ray_probe.core.policy.row_summary import RowSummary
from ray_probe.core.policy.sampling import row_chunks
from ray_probe.core.policy.summarize import SummaryScratch, fill

Rows = slice | Tensor


@dataclass(frozen=True)
class ScoringSpec:
    """The policy's rule, the features' names, and `max_new_tokens`."""

    rule: SamplingRule
    features: tuple[str, ...]
    cap: int


@dataclass(frozen=True, eq=False)
class ScoredTokens:
    """Scores of T tokens, with the summaries and nuclei that backward needs.

    Attributes:
        log_q_T: log q(Y), nats.
        entropy_T: H, nats.
        outside_T: bool, Y lies outside the nucleus.
        features_TD: features; no column if no feature was requested.
        token_scaled_T: scaled logit of Y, float64, nats.
        summary: of the rows.
        nuclei: None for `top_p = 1`, where every token is kept, or if they were not collected.
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
        """Outputs of `score_tokens`: log q(Y), H, outside, features."""
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
    """Turns the gradient by a source's logits into the gradient by its tensors."""

    def add_kept(self, row_M: Tensor, column_M: Tensor, grad_M: Tensor, logit_M: Tensor) -> None:
        """Add a gradient that is 0 except at these tokens; may overwrite `grad_M`."""

    def add_tile(self, rows: Rows, columns: slice, grad_NW: Tensor, logits_NW: Tensor) -> None:
        """Add the gradient by some rows and columns; may overwrite `grad_NW`."""

    def results(self) -> Sequence[Tensor | None]:
        """Return the gradient by each of the source's tensors."""


class LogitSource(Protocol):
    """Gives rows of raw logits, one for each scored token.

    Attributes:
        shape: scored tokens T and vocabulary V.
        dtype: of the logits.
        multiple: divides the width of every tile but the last in backward.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    multiple: int

    def blocks(self, picked_N: Tensor | None, whole: bool) -> Iterator[tuple[slice, Rows]]:
        """Yield blocks of rows: places among the picked rows, and `rows` for `logits`.

        Args:
            picked_N: int64, the rows to visit; None: all.
            whole: the caller will request whole rows of logits, not tiles.
        """

    def logits(self, rows: Rows, columns: slice) -> Tensor:
        """Return a block's logits in some columns [N, W], valid until the next call."""

    def collector(self) -> NucleusCollector:
        """Return a new collector of the nuclei that backward needs."""

    def sink(self, needed: Sequence[bool]) -> GradientSink:
        """Return a new sink; `needed` marks the tensors that need a gradient."""


def scores_from(
    summary: RowSummary, logit_T: Tensor, position_T: Tensor, spec: ScoringSpec, nuclei: KeptNuclei | None = None
) -> ScoredTokens:
    """Return the scores of tokens from their raw logits [T] and their rows' summaries."""
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
    """Fill the summary and the tokens' logits from whole rows; collect the nuclei."""
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
    """Fill the summary and the tokens' logits for `top_p = 1`, tile by tile."""
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
