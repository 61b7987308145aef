"""The search for the nucleus of a chunk of rows, without sorting the vocabulary.

A ladder. The largest tokens of a row are found among the blocks of the vocabulary with the largest maxima; where they
do not hold the nucleus for certain, more of them are taken, and a row whose nucleus is too wide for that is put into
a histogram of its masses, whose one bin with the boundary is sorted. What decides is always masses in float64 of
scaled logits in float32 (or wider), so the nucleus does not depend on the rung that found it.

Shape suffixes: R rows of the chunk, V vocabulary, N some rows, K candidates of a row, B block, M blocks, H bins.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ray_probe.core.scaling import SamplingRule, exponentials, quick_exponentials, scaled, tiles

RUNGS = (64, 512)
_BLOCK = 16
_BINS = 4096
_WIDE_SHARE = 8  # a wide row has tables of float64 numbers: so much smaller is the part of a chunk done at a time
_DOUBT = {torch.float32: 1e-5, torch.float64: 1e-12}  # relative, of a sum of `quick_exponentials`


@dataclass(frozen=True)
class Candidates:
    """Some rows of a chunk with tokens that hold their nuclei.

    Attributes:
        rows_N: int64, which rows of the chunk.
        columns_NK: int64, the candidates' tokens, or None where they are the whole vocabulary in its order.
        largest_N: largest raw logit of the row.
        scaled_NK: scaled logits, nats; the largest is 0.
        keep_NK: bool, the candidate is in the nucleus S.
        mass_NK: float64, exp(scaled).
        rest_N: float64, summed exp(scaled) of all tokens that are no candidates.
        threshold_N: smallest scaled logit of S: S is `scaled >= threshold`, also among all tokens.
        second_N: second largest scaled logit of the row, -inf where there is none.
    """

    rows_N: Tensor
    columns_NK: Tensor | None
    largest_N: Tensor
    scaled_NK: Tensor
    keep_NK: Tensor
    mass_NK: Tensor
    rest_N: Tensor
    threshold_N: Tensor
    second_N: Tensor


@dataclass(frozen=True)
class _Rung:
    """The largest tokens of some rows, in falling order, and what they decide."""

    rows_N: Tensor
    columns_NK: Tensor
    scaled_NK: Tensor
    mass_NK: Tensor
    rest_N: Tensor
    threshold_N: Tensor
    closed_N: Tensor

    def closed(self, largest_R1: Tensor, second_R: Tensor) -> Candidates:
        """The rows whose nucleus is known."""
        pick = self.closed_N.nonzero().squeeze(-1)
        rows_N, scaled_NK, threshold_N = self.rows_N[pick], self.scaled_NK[pick], self.threshold_N[pick]
        keep_NK = _level_set(scaled_NK, threshold_N)
        return Candidates(
            rows_N, self.columns_NK[pick], largest_R1[rows_N, 0], scaled_NK, keep_NK, self.mass_NK[pick],
            self.rest_N[pick], threshold_N, second_R[rows_N],
        )  # fmt: skip

    def within_reach(self, size: int, top_p: float) -> Tensor:
        """Of the open rows, those that `size` candidates could close [N]: the next ones weigh no more than the last."""
        held_N = self.mass_NK.sum(dim=-1)
        most_N = held_N + (size - self.mass_NK.shape[-1]) * self.mass_NK[:, -1]
        return ~self.closed_N & (most_N > top_p * (held_N + self.rest_N))


def candidates(logits_RV: Tensor, rule: SamplingRule) -> Iterator[Candidates]:
    """The nuclei of a chunk of rows for `top_p < 1`; every row comes once, in any order.

    S is every token such that the total mass of strictly more probable tokens is at most `top_p`, so S is a level
    set and ties stay together. Source: spec section 2.

    Args:
        logits_RV: raw logits, float32 or wider; -inf marks a token that cannot occur.
        rule: temperature and top_p.
    """
    rows, vocabulary = logits_RV.shape
    rows_R = torch.arange(rows, device=logits_RV.device)
    if vocabulary <= RUNGS[-1]:
        values_RV, columns_RV = logits_RV.topk(vocabulary, dim=-1)
        largest_R1 = values_RV[:, :1]
        scaled_RV = scaled(values_RV, largest_R1, rule.temperature)
        second_R = scaled_RV[:, 1] if vocabulary > 1 else torch.full_like(scaled_RV[:, 0], -torch.inf)
        rung = _judge(rows_R, columns_RV, scaled_RV, torch.zeros_like(scaled_RV[:, 0]), rule.top_p, True)
        yield rung.closed(largest_R1, second_R)
        return
    blocks = _Blocks(logits_RV)
    largest_R1 = blocks.maxima_RM.amax(dim=-1, keepdim=True)
    weight_RV = torch.empty_like(logits_RV)
    for tile in tiles(rows, vocabulary, logits_RV.device):
        quick_exponentials(logits_RV[:, tile], largest_R1, rule.temperature, weight_RV[:, tile])
    open_N, wide, second_R = rows_R, [], torch.empty(0)
    for size, following in zip(RUNGS, (*RUNGS[1:], 0), strict=True):
        columns_NK, values_NK = blocks.largest(open_N, size)
        weight_RV[open_N.unsqueeze(-1), columns_NK] = 0.0
        rest_N = (weight_RV if len(open_N) == rows else weight_RV[open_N]).sum(dim=-1)
        scaled_NK = scaled(values_NK, largest_R1[open_N], rule.temperature)
        rung = _judge(open_N, columns_NK, scaled_NK, rest_N, rule.top_p, False)
        if size == RUNGS[0]:
            second_R = scaled_NK[:, 1]
        yield rung.closed(largest_R1, second_R)
        reach_N = rung.within_reach(following, rule.top_p)
        wide.append(open_N[~rung.closed_N & ~reach_N])
        open_N = open_N[reach_N]
        if len(open_N) == 0:
            break
    del weight_RV
    rows_W = torch.cat(wide)
    if len(rows_W):
        yield from _wide_rows(logits_RV, largest_R1, second_R, rows_W, rule)


def kept_tokens(
    logits_RV: Tensor, largest_R: Tensor, threshold_R: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The nuclei again, from their thresholds: row, token and scaled logit of every kept token [M], each.

    Blocks of the vocabulary whose maximum is below the threshold are not looked into.
    """
    blocks = _Blocks(logits_RV)
    top_RM = scaled(blocks.maxima_RM[:, : blocks.blocks], largest_R.unsqueeze(-1), temperature)
    row_P, block_P = (top_RM >= threshold_R.unsqueeze(-1)).nonzero(as_tuple=True)
    steps_B = torch.arange(_BLOCK, device=row_P.device) * blocks.blocks
    columns = (block_P.unsqueeze(-1) + steps_B).flatten()
    rows = row_P.unsqueeze(-1).expand(-1, _BLOCK).flatten()
    left_rows = torch.arange(len(logits_RV), device=row_P.device).unsqueeze(-1).expand_as(blocks.left_RK).flatten()
    rows, columns = torch.cat([rows, left_rows]), torch.cat([columns, blocks.left.repeat(len(logits_RV))])
    levels = scaled(logits_RV[rows, columns], largest_R[rows], temperature)
    kept = ((levels >= threshold_R[rows]) & (levels > -torch.inf)).nonzero().squeeze(-1)
    return rows[kept], columns[kept], levels[kept]


class _Blocks:
    """Maxima of blocks of the vocabulary: block m is tokens m, m + M, m + 2 M..., and a short last one of its own."""

    def __init__(self, logits_RV: Tensor) -> None:
        rows, vocabulary = logits_RV.shape
        self.logits_RV = logits_RV
        self.blocks = vocabulary // _BLOCK
        whole = self.blocks * _BLOCK
        maxima_RM = logits_RV[:, :whole].unflatten(-1, (_BLOCK, self.blocks)).amax(dim=1)
        self.left = torch.arange(whole, vocabulary, device=logits_RV.device)
        self.left_RK = logits_RV[:, whole:]
        self.maxima_RM = torch.cat([maxima_RM, self.left_RK.amax(dim=-1, keepdim=True)], -1) if len(self.left) else maxima_RM

    def largest(self, rows_N: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """Columns and raw logits [N, size] of the largest tokens, in falling order.

        Fewer than `size` blocks have a maximum above the `size`-th largest of all maxima, so the blocks with the
        largest maxima hold the largest tokens.
        """
        maxima_NM = self.maxima_RM[:, : self.blocks]
        every = len(rows_N) == len(maxima_NM)
        maxima_NM = maxima_NM if every else maxima_NM[rows_N]
        blocks_N1K = maxima_NM.topk(min(size, self.blocks), dim=-1, sorted=False).indices.unsqueeze(1)
        steps_B1 = torch.arange(_BLOCK, device=rows_N.device).mul_(self.blocks).unsqueeze(-1)
        columns_NK = (blocks_N1K + steps_B1).flatten(1)
        columns_NK = torch.cat([columns_NK, self.left.expand(len(rows_N), -1)], dim=-1)
        if every:
            values_NK = self.logits_RV.gather(-1, columns_NK)
        else:
            values_NK = self.logits_RV[rows_N.unsqueeze(-1), columns_NK]
        values_NK, order_NK = values_NK.topk(size, dim=-1)
        return columns_NK.gather(-1, order_NK), values_NK


def _level_set(scaled_NK: Tensor, threshold_N: Tensor) -> Tensor:
    return (scaled_NK >= threshold_N.unsqueeze(-1)) & (scaled_NK > -torch.inf)


def _judge(
    rows_N: Tensor, columns_NK: Tensor, scaled_NK: Tensor, rest_N: Tensor, top_p: float, complete: bool
) -> _Rung:
    """Where the boundary falls among candidates in falling order, and in which rows that is certain.

    It is certain where no rounding of `rest` could move it and a candidate lies strictly below it (or all tokens are
    candidates), so that no tie is left outside.
    """
    mass_NK = exponentials(scaled_NK)
    above_NK = mass_NK.cumsum(dim=-1) - mass_NK
    above_NK[:, 0] = 0.0
    total_N = mass_NK.sum(dim=-1) + rest_N
    doubt_N = rest_N.double() * _DOUBT[scaled_NK.dtype]
    most_N = (above_NK <= (top_p * (total_N + doubt_N)).unsqueeze(-1)).sum(dim=-1)
    least_N = (above_NK <= (top_p * (total_N - doubt_N)).unsqueeze(-1)).sum(dim=-1)
    threshold_N = scaled_NK.gather(-1, (most_N - 1).unsqueeze(-1)).squeeze(-1)
    if complete:
        closed_N = torch.ones_like(rows_N, dtype=torch.bool)
    else:
        closed_N = (most_N == least_N) & (scaled_NK[:, -1] < threshold_N)
    return _Rung(rows_N, columns_NK, scaled_NK, mass_NK, rest_N.double(), threshold_N, closed_N)


def _wide_rows(
    logits_RV: Tensor, largest_R1: Tensor, second_R: Tensor, rows_W: Tensor, rule: SamplingRule
) -> Iterator[Candidates]:
    for rows_N in rows_W.split(max(1, len(logits_RV) // _WIDE_SHARE)):
        scaled_NV = scaled(logits_RV[rows_N], largest_R1[rows_N], rule.temperature)
        mass_NV = exponentials(scaled_NV)
        threshold_N = _threshold_by_histogram(scaled_NV, mass_NV, rule.top_p)
        keep_NV = _level_set(scaled_NV, threshold_N)
        yield Candidates(
            rows_N, None, largest_R1[rows_N, 0], scaled_NV, keep_NV, mass_NV, torch.zeros_like(mass_NV[:, 0]),
            threshold_N, second_R[rows_N],
        )  # fmt: skip


def _threshold_by_histogram(scaled_NV: Tensor, mass_NV: Tensor, top_p: float) -> Tensor:
    """Smallest scaled logit of each nucleus [N]: the lowest bin with a token of S, sorted.

    Bins are even in scaled logits, from below any threshold up to 0: tokens lighter than (1 - top_p) / V of the
    total weigh less than 1 - top_p together, so none of them is the boundary.
    """
    limit_N1 = top_p * mass_NV.sum(dim=-1, keepdim=True)
    least_N1 = ((limit_N1 / top_p - limit_N1) / mass_NV.shape[-1]).log_().sub_(1e-3).to(scaled_NV.dtype)
    bin_NV = ((scaled_NV - least_N1) * (_BINS / -least_N1)).clamp_(0, _BINS - 1).long()
    mass_NH = torch.zeros(len(mass_NV), _BINS, dtype=mass_NV.dtype, device=mass_NV.device)
    mass_NH.scatter_add_(-1, bin_NV, mass_NV)
    above_NH = mass_NH.flip(-1).cumsum(dim=-1).flip(-1) - mass_NH
    above_NH[:, -1] = 0.0
    holds_NH = (mass_NH > 0) & (above_NH <= limit_N1)
    lowest_N1 = holds_NH.int().argmax(dim=-1, keepdim=True)
    row_M, column_M = (bin_NV == lowest_N1).nonzero(as_tuple=True)
    inside_NK = _padded(scaled_NV[row_M, column_M], row_M, len(scaled_NV)).sort(dim=-1, descending=True).values
    weight_NK = exponentials(inside_NK)
    reached_NK = above_NH.gather(-1, lowest_N1) + weight_NK.cumsum(dim=-1) - weight_NK
    kept_N1 = (reached_NK <= limit_N1).logical_and_(weight_NK > 0).sum(dim=-1, keepdim=True)
    return inside_NK.gather(-1, (kept_N1 - 1).clamp_(min=0)).squeeze(-1)


def _padded(values_M: Tensor, row_M: Tensor, rows: int) -> Tensor:
    """Values that lie side by side, one row's after the other's, as a table filled up with -inf [rows, K]."""
    counts_N = torch.bincount(row_M, minlength=rows)
    position_M = torch.arange(len(row_M), device=row_M.device) - (counts_N.cumsum(0) - counts_N)[row_M]
    table_NK = values_M.new_full((rows, int(counts_N.max())), -torch.inf)
    table_NK[row_M, position_M] = values_M
    return table_NK
