"""Finds the nuclei of a chunk of rows without sorting the vocabulary.

The search is a ladder. Its first rung takes a row's largest tokens from the blocks of the vocabulary with the largest
maxima. Where they may not hold the whole nucleus, the next rung takes more of them. A row whose nucleus is too wide for
the last rung puts its masses into a histogram, and only the bin with the boundary is sorted. Masses in float64 of
scaled logits in float32 (or wider) decide on every rung, so the nucleus does not depend on the rung that found it.

Shape suffixes: R rows of the chunk, V vocabulary, N some rows, K candidates of a row, B block, M blocks, H bins.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_probe.core.policy.block_maxima import BlockMaxima
from ray_probe.core.policy.logits import (
    LEAST,
    LOG2_E,
    Buffer,
    SamplingRule,
    exponentials,
    powers_of_two,
    quick_exponentials,
    scaled,
    tiles,
)

RUNGS = (32, 512, 4096)
_WORTH = 8  # a later rung is used where the vocabulary has at least 8 times its tokens
_SHORT = 512  # a vocabulary up to this size is sorted whole
_BINS = 4096
_WIDE_SHARE = 8  # wide rows need float64 tables: 1/8 of a chunk's rows at a time,
_WIDE_ELEMENTS = 1 << 17  # or as many rows as hold 2^17 elements
_DOUBT = {torch.float32: 1e-5, torch.float64: 1e-12}  # relative error of a sum of `quick_exponentials`


@dataclass(frozen=True)
class NucleusScratch:
    """Memory for the tables of `candidates`, reused by every chunk."""

    maxima: Buffer = field(default_factory=Buffer)
    weight: Buffer = field(default_factory=Buffer)
    scaled: Buffer = field(default_factory=Buffer)
    level: Buffer = field(default_factory=Buffer)
    mass: Buffer = field(default_factory=Buffer)
    place: Buffer = field(default_factory=Buffer)
    bin: Buffer = field(default_factory=Buffer)


@dataclass(frozen=True)
class Candidates:
    """Some rows of a chunk with tokens that hold their nuclei; valid until the next ones are asked for.

    Attributes:
        rows_N: int64, rows of the chunk.
        columns_NK: int64, the candidates' tokens; None: the whole vocabulary in its order.
        largest_N: largest raw logit of the row.
        scaled_NK: float64, scaled logits, nats; the largest is 0, and none is below -80.
        mass_NK: float64, exp(scaled) in the nucleus S, 0 outside.
        rest_N: float64, summed exp(scaled) of all tokens outside S.
        kept_N: int64, tokens in S.
        threshold_N: smallest scaled logit of S: S is `scaled >= threshold`, also among all tokens.
        second_N: second largest scaled logit of the row, -inf in a vocabulary of one token.
    """

    rows_N: Tensor
    columns_NK: Tensor | None
    largest_N: Tensor
    scaled_NK: Tensor
    mass_NK: Tensor
    rest_N: Tensor
    kept_N: Tensor
    threshold_N: Tensor
    second_N: Tensor


def candidates(logits_RV: Tensor, rule: SamplingRule, scratch: NucleusScratch) -> Iterator[Candidates]:
    """Yield the nuclei of a chunk of rows for `top_p < 1`; every row comes once, in any order.

    S is every token such that the total mass of strictly more probable tokens is at most `top_p`, so S is a level
    set and ties stay together. Source: spec section 2.

    Args:
        logits_RV: raw logits, float32 or wider; -inf marks a token that cannot occur.
        rule: temperature and top_p.
        scratch: memory for tables.
    """
    rows, vocabulary = logits_RV.shape
    rows_R = torch.arange(rows, device=logits_RV.device)
    if vocabulary <= _SHORT:
        values_RV, columns_RV = logits_RV.topk(vocabulary, dim=-1)
        rung = _Rung(rows_R, columns_RV, values_RV, values_RV[:, :1], None, rule)
        yield rung.closed(values_RV[:, :1], rung.second_N)
        return
    blocks = BlockMaxima(logits_RV, scratch.maxima)
    largest_R1 = blocks.maxima_RM.amax(dim=-1, keepdim=True)
    weight_RV = scratch.weight.like(logits_RV)
    for tile in tiles(rows, vocabulary, logits_RV.device):
        quick_exponentials(logits_RV[:, tile], largest_R1, rule.temperature, weight_RV[:, tile])
    rungs = [size for size in RUNGS if size == RUNGS[0] or size * _WORTH <= vocabulary]
    open_N, wide, second_R = rows_R, [], torch.empty(0)
    for size, following in zip(rungs, (*rungs[1:], None), strict=True):
        columns_NK, values_NK = blocks.largest(open_N, size)
        rung = _Rung(open_N, columns_NK, values_NK, largest_R1[open_N], weight_RV, rule)
        second_R = rung.second_N if size == RUNGS[0] else second_R
        if rung.closed_N.any():
            yield rung.closed(largest_R1, second_R)
        reach_N = rung.within_reach(following)
        wide.append(open_N[~rung.closed_N & ~reach_N])
        open_N = open_N[reach_N]
        if len(open_N) == 0:
            break
    yield from _wide_rows(logits_RV, largest_R1, second_R, torch.cat(wide), rule, scratch)


class _Rung:
    """The largest tokens of some rows in falling order, and the rows whose boundary they decide for certain.

    The boundary is certain where rounding of the other tokens' weight cannot move it and a candidate lies strictly
    below it, so that no tie is left outside. It is certain too where there are no other tokens.

    Args:
        rows_N: rows of the chunk.
        columns_NK: their largest tokens.
        values_NK: raw logits of these tokens.
        largest_N1: largest raw logit of each row.
        weight_RV: exponentials of the chunk's logits; None: `columns_NK` is the whole vocabulary.
        rule: temperature and top_p.
    """

    def __init__(
        self, rows_N: Tensor, columns_NK: Tensor, values_NK: Tensor, largest_N1: Tensor, weight_RV: Tensor | None,
        rule: SamplingRule,
    ) -> None:  # fmt: skip
        self.rows_N, self.columns_NK, self.top_p = rows_N, columns_NK, rule.top_p
        self.scaled_NK = scaled(values_NK, largest_N1, rule.temperature)
        self.mass_NK = exponentials(self.scaled_NK)
        self.others_N = torch.zeros_like(self.mass_NK[:, 0]) if weight_RV is None else self._weighed(weight_RV)
        above_NK = self.mass_NK.cumsum(dim=-1).sub_(self.mass_NK)
        above_NK[:, 0] = 0.0
        self.held_N = self.mass_NK.sum(dim=-1)
        doubt_N = self.others_N * _DOUBT[values_NK.dtype]
        total_N = self.held_N + self.others_N
        most_N = (above_NK <= (self.top_p * (total_N + doubt_N)).unsqueeze(-1)).sum(dim=-1)
        least_N = (above_NK <= (self.top_p * (total_N - doubt_N)).unsqueeze(-1)).sum(dim=-1)
        self.threshold_N = self.scaled_NK.gather(-1, (most_N - 1).clamp_(min=0).unsqueeze(-1)).squeeze(-1)
        self.closed_N = (most_N == least_N) & (self.scaled_NK[:, -1] < self.threshold_N)
        if weight_RV is None:
            self.closed_N.fill_(True)

    def _weighed(self, weight_RV: Tensor) -> Tensor:
        """Return the summed weight of all tokens but the candidates [N]; sets the candidates' weights to 0."""
        if len(self.rows_N) == len(weight_RV):
            weight_RV.scatter_(-1, self.columns_NK, 0.0)
            return weight_RV.sum(dim=-1).double()
        weight_RV[self.rows_N.unsqueeze(-1), self.columns_NK] = 0.0
        return torch.stack([weight_RV[row].sum() for row in self.rows_N]).double()

    @property
    def second_N(self) -> Tensor:
        """Second largest scaled logit; -inf in a vocabulary of one token."""
        if self.scaled_NK.shape[-1] == 1:
            return torch.full_like(self.threshold_N, -torch.inf)
        return self.scaled_NK[:, 1]

    def closed(self, largest_R1: Tensor, second_R: Tensor) -> Candidates:
        """Return the rows whose nucleus is certain."""
        pick = self.closed_N.nonzero().squeeze(-1)
        rows_N, scaled_NK, threshold_N = self.rows_N[pick], self.scaled_NK[pick], self.threshold_N[pick]
        mass_NK, keep_NK = self.mass_NK[pick], scaled_NK >= threshold_N.unsqueeze(-1)
        outside_N = (mass_NK * ~keep_NK).sum(dim=-1) + self.others_N[pick]
        return Candidates(
            rows_N, self.columns_NK[pick], largest_R1[rows_N, 0], scaled_NK.clamp(min=LEAST).double(),
            mass_NK * keep_NK, outside_N, keep_NK.sum(dim=-1), threshold_N, second_R[rows_N],
        )  # fmt: skip

    def within_reach(self, size: int | None) -> Tensor:
        """Mark the open rows that `size` candidates could close [N]; none where there is no further rung."""
        if size is None:
            return torch.zeros_like(self.closed_N)
        # Each further candidate weighs no more than the last one.
        most_N = self.held_N + (size - self.mass_NK.shape[-1]) * self.mass_NK[:, -1]
        return ~self.closed_N & (most_N > self.top_p * (self.held_N + self.others_N))


def _wide_rows(
    logits_RV: Tensor, largest_R1: Tensor, second_R: Tensor, rows_W: Tensor, rule: SamplingRule, scratch: NucleusScratch
) -> Iterator[Candidates]:
    """Yield the rows that no rung closes, by histogram."""
    size = max(1, len(logits_RV) // _WIDE_SHARE, _WIDE_ELEMENTS // logits_RV.shape[-1])
    for start in range(0, len(rows_W), size):
        rows_N = rows_W[start : start + size]
        scaled_NV = scratch.scaled.table((len(rows_N), logits_RV.shape[-1]), logits_RV.dtype, logits_RV.device)
        torch.index_select(logits_RV, 0, rows_N, out=scaled_NV).sub_(largest_R1[rows_N]).div_(rule.temperature)
        level_NV, mass_NV = scratch.level.like(scaled_NV, torch.float64), scratch.mass.like(scaled_NV, torch.float64)
        powers_of_two(level_NV.copy_(scaled_NV).mul_(LOG2_E), mass_NV)
        total_N1 = mass_NV.sum(dim=-1, keepdim=True)
        threshold_N1 = _boundary(scaled_NV, mass_NV, total_N1, rule.top_p, scratch)
        mass_NV.mul_(torch.ge(scaled_NV, threshold_N1, out=level_NV))  # for now, 1 in the nucleus and 0 outside
        kept_N = level_NV.count_nonzero(dim=-1)
        level_NV.copy_(scaled_NV).clamp_(min=LEAST)
        yield Candidates(
            rows_N, None, largest_R1[rows_N, 0], level_NV, mass_NV, total_N1.squeeze(-1) - mass_NV.sum(dim=-1),
            kept_N, threshold_N1.squeeze(-1), second_R[rows_N],
        )  # fmt: skip


def _boundary(
    scaled_NV: Tensor, mass_NV: Tensor, total_N1: Tensor, top_p: float, scratch: NucleusScratch
) -> Tensor:  # fmt: skip
    """Return the smallest scaled logit of each nucleus [N, 1]; it lies in the lowest bin with a token of S."""
    limit_N1 = top_p * total_N1
    # Bins are even in scaled logits, from below any threshold up to 0: tokens lighter than (1 - top_p) / V of the
    # total weigh less than 1 - top_p together, so none of them is the boundary.
    least_N1 = ((total_N1 - limit_N1) / scaled_NV.shape[-1]).log_().sub_(1e-3).to(scaled_NV.dtype)
    place_NV = torch.sub(scaled_NV, least_N1, out=scratch.place.like(scaled_NV))
    place_NV.mul_(_BINS / -least_N1).clamp_(0, _BINS - 1)
    bin_NV = scratch.bin.like(scaled_NV, torch.int64).copy_(place_NV)
    mass_NH = mass_NV.new_zeros(len(mass_NV), _BINS).scatter_add_(-1, bin_NV, mass_NV)
    above_NH = mass_NH.flip(-1).cumsum(dim=-1).flip(-1).sub_(mass_NH)
    above_NH[:, -1] = 0.0
    lowest_N1 = ((mass_NH > 0) & (above_NH <= limit_N1)).int().argmax(dim=-1, keepdim=True)
    row_M, column_M = (bin_NV == lowest_N1).nonzero(as_tuple=True)
    inside_NK = _padded(scaled_NV[row_M, column_M], row_M, len(scaled_NV)).sort(dim=-1, descending=True).values
    weight_NK = exponentials(inside_NK)
    reached_NK = above_NH.gather(-1, lowest_N1) + weight_NK.cumsum(dim=-1) - weight_NK
    kept_N1 = ((reached_NK <= limit_N1) & (weight_NK > 0)).sum(dim=-1, keepdim=True)
    return inside_NK.gather(-1, (kept_N1 - 1).clamp_(min=0))


def _padded(values_M: Tensor, row_M: Tensor, rows: int) -> Tensor:
    """Return the values of each row, given one row after the other, as a table padded with -inf [rows, K]."""
    counts_N = torch.bincount(row_M, minlength=rows)
    position_M = torch.arange(len(row_M), device=row_M.device) - (counts_N.cumsum(0) - counts_N)[row_M]
    table_NK = values_M.new_full((rows, int(counts_N.max())), -torch.inf)
    table_NK[row_M, position_M] = values_M
    return table_NK
