"""The sampling policy for `top_p = 1`, in one pass over tiles of the vocabulary.

`top_p = 1` has its own branch: there S is every token, but a rounded sum of probabilities can pass 1 before the last.

Shape suffixes: R rows, V vocabulary, J tiles of the vocabulary, B blocks of it, K tokens of a block.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_probe.core.policy.logits import (
    LEAST,
    LOG2_E,
    Buffer,
    exponentials,
    quick_exponentials,
    tiles,
    without_least_,
)
from ray_probe.core.policy.row_summary import RowSummary

BLOCK = 256


@dataclass(frozen=True)
class MomentScratch:
    """Memory for the tables of `Moments`, reused by every tile."""

    mass: Buffer = field(default_factory=Buffer)
    bits: Buffer = field(default_factory=Buffer)


def whole_vocabulary(logits_RV: Tensor, temperature: float, scratch: MomentScratch) -> tuple[RowSummary, Tensor]:
    """Return the summaries for `top_p = 1` and the blocks' masses [R, B]."""
    moments = Moments(temperature, scratch)
    for tile in tiles(len(logits_RV), logits_RV.shape[-1], logits_RV.device, BLOCK):
        moments.add(logits_RV[:, tile])
    return moments.summary(), moments.block_masses()


class Moments:
    """Sums over tiles of the vocabulary that give the summary for `top_p = 1`.

    Args:
        temperature: of the policy.
        scratch: memory for tables.
    """

    # Each tile is read once, with sums relative to its own largest logit; `summary` joins them in float64.

    def __init__(self, temperature: float, scratch: MomentScratch) -> None:
        self.temperature = temperature
        self._scratch = scratch
        self._vocabulary = 0
        self._tiles: list[tuple[Tensor, ...]] = []
        self._blocks: list[Tensor] = []

    def add(self, logits_RV: Tensor) -> None:
        """Add the next tile of raw logits; `BLOCK` divides the width of all but the last."""
        self._vocabulary += logits_RV.shape[-1]
        largest_R1, second_R1 = _two_largest(logits_RV)
        largest_R1 = largest_R1.clamp(min=torch.finfo(largest_R1.dtype).min)  # a tile may hold only -inf
        mass_RV, bits_RV = self._scratch.mass.like(logits_RV), self._scratch.bits.like(logits_RV)
        quick_exponentials(logits_RV, largest_R1, self.temperature, mass_RV, bits_RV)
        block_RB = block_sums(without_least_(mass_RV))
        first_R = mass_RV.mul_(bits_RV).sum(dim=-1)
        square_R = mass_RV.mul_(bits_RV).sum(dim=-1)
        self._blocks.append(block_RB)
        self._tiles.append((largest_R1[:, 0], second_R1[:, 0], block_RB.sum(dim=-1), first_R, square_R))

    def _steps(self) -> tuple[Tensor, Tensor]:
        """Return the row's largest logit [R, 1] and each tile's scaled largest [R, J]."""
        largest_RJ = torch.stack([tile[0] for tile in self._tiles], dim=-1)
        largest_R1 = largest_RJ.amax(dim=-1, keepdim=True)
        step_RJ = (largest_RJ.double() - largest_R1.double()).div_(self.temperature)
        return largest_R1, step_RJ

    def block_masses(self) -> Tensor:
        """Return exp(scaled) summed over blocks of the vocabulary [R, B], float64."""
        weight_RJ = exponentials(self._steps()[1])
        return torch.cat([block * weight_RJ[:, j, None] for j, block in enumerate(self._blocks)], dim=-1)

    def summary(self) -> RowSummary:
        """Return the summary of all tiles."""
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
    """Return float64 sums of blocks of `BLOCK` tokens [R, B]; the last may be short."""
    whole = mass_RV.shape[-1] // BLOCK * BLOCK
    sums_RB = torch.unflatten(mass_RV[:, :whole], -1, (whole // BLOCK, BLOCK)).sum(dim=-1)
    if whole < mass_RV.shape[-1]:
        sums_RB = torch.cat([sums_RB, mass_RV[:, whole:].sum(dim=-1, keepdim=True)], dim=-1)
    return sums_RB.double()


def _two_largest(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two largest logits of each row [R, 1]; -inf if there is no second."""
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
