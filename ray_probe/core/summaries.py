"""Logits -> the sampling policy at each prefix in a few numbers: what scoring, features and backward need of a row.

Shape suffixes: R rows, V vocabulary, N some rows, K candidates, J tiles of the vocabulary, B blocks of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import torch
from torch import Tensor

from ray_probe.core.nucleus import Candidates, candidates
from ray_probe.core.scaling import (
    LEAST,
    LOG2_E,
    SamplingRule,
    Workspace,
    exponentials,
    quick_exponentials,
    tiles,
    without_least_,
)

BLOCK = 256


class Summaries(Protocol):
    """What a feature may know of the policy at T prefixes."""

    @property
    def top1_T(self) -> Tensor:
        """Largest probability in q."""

    @property
    def margin_T(self) -> Tensor:
        """Difference of the two largest kept scaled logits, nats; 0 where one token is kept."""

    @property
    def tail_mass_T(self) -> Tensor:
        """Mass of the full softmax outside S, summed by itself: 1 - head mass would cancel."""

    @property
    def logit_var_T(self) -> Tensor:
        """Variance of the scaled logits under q, nats^2."""


@dataclass(frozen=True)
class RowSummary:
    """The policy at T prefixes; float64 unless said.

    Attributes:
        largest_T: largest raw logit, in the logits' dtype (widened).
        threshold_T: smallest scaled logit of S, in the same dtype: S is `scaled >= threshold`; -inf for `top_p = 1`.
        kept_T: int64, tokens in S; the whole vocabulary for `top_p = 1`.
        log_norm_T: logsumexp of the scaled logits over S, nats.
        entropy_T: entropy of q, nats; never below 0.
        top1_T: see `Summaries`, as are the next three.
        margin_T: nats.
        tail_mass_T: share.
        logit_var_T: nats^2.
    """

    largest_T: Tensor
    threshold_T: Tensor
    kept_T: Tensor
    log_norm_T: Tensor
    entropy_T: Tensor
    top1_T: Tensor
    margin_T: Tensor
    tail_mass_T: Tensor
    logit_var_T: Tensor

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device) -> "RowSummary":
        """Of any content, for so many rows of logits of this dtype."""
        dtypes = {"largest_T": dtype, "threshold_T": dtype, "kept_T": torch.int64}
        names = [field.name for field in fields(cls)]
        return cls(*(torch.empty(rows, dtype=dtypes.get(name, torch.float64), device=device) for name in names))

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All of it, in order."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def __getitem__(self, rows: slice) -> "RowSummary":
        return RowSummary(*(column[rows] for column in self.columns))

    def put(self, rows_N: Tensor | None, part: "RowSummary") -> None:
        """Write some rows, or all for None."""
        for column_T, part_N in zip(self.columns, part.columns, strict=True):
            if rows_N is None:
                column_T.copy_(part_N)
            else:
                column_T.index_copy_(0, rows_N, part_N)


def fill(
    summary: RowSummary, logits_RV: Tensor, rule: SamplingRule, space: Workspace,
    use: Callable[[Candidates], None] = lambda group: None,
) -> None:  # fmt: skip
    """Find the sampling policy at each row of a chunk of logits (spec section 2), and write what is said of it.

    Args:
        summary: of so many rows; a part of a longer one, so that chunks leave nothing behind in memory.
        logits_RV: raw logits, float32 or wider.
        rule: temperature and top_p.
        space: memory for tables.
        use: called with each group of rows as its nucleus is found; never called for `top_p = 1`, which has no
            nucleus to search for.
    """
    if rule.top_p >= 1.0:
        summary.put(None, whole_vocabulary(logits_RV, rule.temperature, space)[0])
        return
    for group in candidates(logits_RV, rule, space):
        summary.put(group.rows_N, _of_candidates(group, space))
        use(group)


def summarize(logits_RV: Tensor, rule: SamplingRule) -> RowSummary:
    """The sampling policy at each row of raw logits (float32 or wider), as one chunk."""
    summary = RowSummary.empty(len(logits_RV), logits_RV.dtype, logits_RV.device)
    fill(summary, logits_RV, rule, Workspace())
    return summary


def _of_candidates(group: Candidates, space: Workspace) -> RowSummary:
    mass_NK, level_NK = group.mass_NK, group.scaled_NK
    product_NK = space.table("product", mass_NK.shape, torch.float64, mass_NK.device)
    norm_N = mass_NK.sum(dim=-1)
    log_norm_N = norm_N.log()
    mean_N = torch.mul(mass_NK, level_NK, out=product_NK).sum(dim=-1) / norm_N
    variance_N = product_NK.mul_(level_NK).sum(dim=-1) / norm_N - mean_N.square()
    return RowSummary(
        largest_T=group.largest_N,
        threshold_T=group.threshold_N,
        kept_T=group.kept_N,
        log_norm_T=log_norm_N,
        entropy_T=(log_norm_N - mean_N).clamp_(min=0.0),
        top1_T=1.0 / norm_N,
        margin_T=torch.where(group.second_N >= group.threshold_N, -group.second_N.double(), 0.0),
        tail_mass_T=group.rest_N / (norm_N + group.rest_N),
        logit_var_T=variance_N.clamp_(min=0.0),
    )


def whole_vocabulary(logits_RV: Tensor, temperature: float, space: Workspace) -> tuple[RowSummary, Tensor]:
    """The policy for `top_p = 1` in one pass, tile by tile, and the masses of blocks of `BLOCK` tokens [R, B].

    A branch of its own: S is every token, while a sum of probabilities can pass 1 by rounding.
    """
    moments = Moments(temperature, space)
    for tile in tiles(len(logits_RV), logits_RV.shape[-1], logits_RV.device, BLOCK):
        moments.add(logits_RV[:, tile])
    return moments.summary(), moments.block_masses()


class Moments:
    """Sums over tiles of the vocabulary from which the summary for `top_p = 1` follows; each tile is read once.

    Every tile has its sums about its own largest logit; they are brought together at the end, in float64.
    """

    def __init__(self, temperature: float, space: Workspace) -> None:
        self.temperature = temperature
        self._space = space
        self._vocabulary = 0
        self._tiles: list[tuple[Tensor, ...]] = []
        self._blocks: list[Tensor] = []

    def add(self, logits_RV: Tensor) -> None:
        """The next tile of raw logits; all but the last are as wide as some multiple of `BLOCK`."""
        self._vocabulary += logits_RV.shape[-1]
        largest_R1, second_R1 = _two_largest(logits_RV)
        largest_R1 = largest_R1.clamp(min=torch.finfo(largest_R1.dtype).min)  # a tile may hold nothing but -inf
        shape, dtype, device = logits_RV.shape, logits_RV.dtype, logits_RV.device
        mass_RV, bits_RV = (self._space.table(name, shape, dtype, device) for name in ("powers", "bits"))
        quick_exponentials(logits_RV, largest_R1, self.temperature, mass_RV, bits_RV)
        block_RB = block_sums(without_least_(mass_RV))
        first_R = mass_RV.mul_(bits_RV).sum(dim=-1)
        square_R = mass_RV.mul_(bits_RV).sum(dim=-1)
        self._blocks.append(block_RB)
        self._tiles.append((largest_R1[:, 0], second_R1[:, 0], block_RB.sum(dim=-1), first_R, square_R))

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Largest logit of all [R, 1] and that of each tile less it, over temperature [R, J], float64, nats."""
        largest_RJ = torch.stack([tile[0] for tile in self._tiles], dim=-1)
        largest_R1 = largest_RJ.amax(dim=-1, keepdim=True)
        step_RJ = (largest_RJ.double() - largest_R1.double()).div_(self.temperature)
        return largest_R1, step_RJ

    def block_masses(self) -> Tensor:
        """exp(scaled) summed over blocks of the vocabulary in its order [R, B], float64."""
        weight_RJ = exponentials(self._steps()[1])
        return torch.cat([block * weight_RJ[:, j, None] for j, block in enumerate(self._blocks)], dim=-1)

    def summary(self) -> RowSummary:
        """The summary of all tiles."""
        largest_R1, step_RJ = self._steps()
        columns = [torch.stack(column, dim=-1).double() for column in zip(*self._tiles, strict=True)]
        mass_RJ, first_RJ, square_RJ = columns[2], columns[3] / LOG2_E, columns[4] / LOG2_E**2
        weight_RJ, step_RJ = exponentials(step_RJ), step_RJ.clamp(min=LEAST)
        norm_R = (weight_RJ * mass_RJ).sum(dim=-1)
        mean_R = (weight_RJ * (first_RJ + step_RJ * mass_RJ)).sum(dim=-1) / norm_R
        about_RJ = step_RJ - mean_R.unsqueeze(-1)
        spread_RJ = square_RJ + about_RJ * (2.0 * first_RJ + about_RJ * mass_RJ)
        two_R2 = torch.cat(columns[:2], dim=-1).topk(2, dim=-1).values
        margin_R = (two_R2[:, 0] - two_R2[:, 1]) / self.temperature
        log_norm_R = norm_R.log()
        return RowSummary(
            largest_T=largest_R1.squeeze(-1),
            threshold_T=torch.full_like(largest_R1.squeeze(-1), -torch.inf),
            kept_T=torch.full_like(norm_R, self._vocabulary, dtype=torch.int64),
            log_norm_T=log_norm_R,
            entropy_T=(log_norm_R - mean_R).clamp_(min=0.0),
            top1_T=1.0 / norm_R,
            margin_T=torch.where(margin_R < torch.finfo(largest_R1.dtype).max, margin_R, 0.0),
            tail_mass_T=torch.zeros_like(norm_R),
            logit_var_T=((weight_RJ * spread_RJ).sum(dim=-1) / norm_R).clamp_(min=0.0),
        )


def block_sums(mass_RV: Tensor) -> Tensor:
    """Sums of blocks of `BLOCK` tokens and of what is left at the end [R, B], float64."""
    whole = mass_RV.shape[-1] // BLOCK * BLOCK
    sums_RB = torch.unflatten(mass_RV[:, :whole], -1, (whole // BLOCK, BLOCK)).sum(dim=-1)
    if whole < mass_RV.shape[-1]:
        sums_RB = torch.cat([sums_RB, mass_RV[:, whole:].sum(dim=-1, keepdim=True)], dim=-1)
    return sums_RB.double()


def _two_largest(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The two largest of each row [R, 1]; -inf for a second one that is not there."""
    width = logits_RV.shape[-1]
    whole = width // BLOCK * BLOCK
    if whole >= 2 * BLOCK:
        maxima_RB = torch.unflatten(logits_RV[:, :whole], -1, (whole // BLOCK, BLOCK)).amax(dim=-1)
        two_R2, block_R2 = maxima_RB.topk(2, dim=-1)
        column_RK = block_R2[:, :1] * BLOCK + torch.arange(BLOCK, device=logits_RV.device)
        inside_R2 = logits_RV.gather(-1, column_RK).topk(2, dim=-1).values
        logits_RV = torch.cat([inside_R2, two_R2[:, 1:], logits_RV[:, whole:]], dim=-1)
    if logits_RV.shape[-1] == 1:
        return logits_RV, torch.full_like(logits_RV, -torch.inf)
    two_R2 = logits_RV.topk(2, dim=-1).values
    return two_R2[:, :1], two_R2[:, 1:]
