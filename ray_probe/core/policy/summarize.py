"""Summarizes rows of logits: finds each nucleus and reduces it to nine numbers.

Shape suffixes: R rows, V vocabulary, N some rows, K candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_probe.core.policy.full_vocabulary import MomentScratch, whole_vocabulary
from ray_probe.core.policy.logits import Buffer, SamplingRule
from ray_probe.core.policy.nucleus.candidates import Candidates, NucleusScratch
from ray_probe.core.policy.nucleus.search import find_nuclei
from ray_probe.core.policy.row_summary import RowSummary


@dataclass(frozen=True)
class SummaryScratch:
    """Memory for the tables of `fill`, reused by every chunk and by later calls."""

    nucleus: NucleusScratch = field(default_factory=NucleusScratch)
    moments: MomentScratch = field(default_factory=MomentScratch)
    product: Buffer = field(default_factory=Buffer)


def fill(
    summary: RowSummary, logits_RV: Tensor, rule: SamplingRule, scratch: SummaryScratch,
    use: Callable[[Candidates], None] | None = None,
) -> None:  # fmt: skip
    """Write the sampling policy at each row of a chunk into a summary.

    Args:
        summary: of R rows; it may be a part of a longer one.
        logits_RV: raw logits, float32 or wider.
        rule: temperature and top_p.
        scratch: memory for tables.
        use: called with each group of rows whose nuclei are found; never for `top_p = 1`, which needs no search.
    """
    if rule.top_p >= 1.0:
        summary[:] = whole_vocabulary(logits_RV, rule.temperature, scratch.moments)[0]
        return
    for group in find_nuclei(logits_RV, rule, scratch.nucleus):
        summary[group.rows_N] = _of_candidates(group, scratch.product)
        if use is not None:
            use(group)


def _of_candidates(group: Candidates, product: Buffer) -> RowSummary:
    """Return the summary of a group of rows."""
    mass_NK, level_NK = group.mass_NK, group.scaled_NK
    product_NK = product.like(mass_NK)
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
