"""Finds nuclei too wide for the rungs, from a histogram of the row's masses.

Only the bin that holds the boundary is sorted.

Shape suffixes: R rows of the chunk, V vocabulary, W wide rows, N some of them, H bins, K tokens of a bin, M the tokens
of a bin of all rows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ray_probe.core.policy.logits import LEAST, LOG2_E, SamplingRule, exponentials, powers_of_two
from ray_probe.core.policy.nucleus.candidates import Candidates, NucleusScratch

_BINS = 4096
_WIDE_SHARE = 8  # wide rows need float64 tables: 1/8 of a chunk's rows at a time,
_WIDE_ELEMENTS = 1 << 17  # or as many rows as hold 2^17 elements


def wide_nuclei(
    logits_RV: Tensor, largest_R1: Tensor, second_R: Tensor, rows_W: Tensor, rule: SamplingRule, scratch: NucleusScratch
) -> Iterator[Candidates]:
    """Yield the nuclei of wide rows, group by group.

    Args:
        logits_RV: raw logits of the chunk.
        largest_R1: largest raw logit of each row.
        second_R: second largest scaled logit of each row.
        rows_W: the wide rows of the chunk.
        rule: temperature and top_p.
        scratch: memory for tables.
    """
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
    """Return the smallest scaled logit of each nucleus [N, 1]."""
    # It lies in the lowest bin with a token of S. Bins are even in scaled logits, from below any threshold up to 0:
    # tokens lighter than (1 - top_p) / V of the total weigh less than 1 - top_p together, so none is the boundary.
    limit_N1 = top_p * total_N1
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
    """Return values in the order of their rows as a table padded with -inf [rows, K]."""
    counts_N = torch.bincount(row_M, minlength=rows)
    position_M = torch.arange(len(row_M), device=row_M.device) - (counts_N.cumsum(0) - counts_N)[row_M]
    table_NK = values_M.new_full((rows, int(counts_N.max())), -torch.inf)
    table_NK[row_M, position_M] = values_M
    return table_NK
