"""Samples tokens from logits by the policy that scoring and features share.

`sample_rows` draws from the nucleus that `ray_probe.core.policy.summarize` finds, so sampling and scoring use the same
nucleus.

Shape suffixes: T rows (one a token), V vocabulary, N some rows, K candidates, B blocks of the vocabulary.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ray_probe.core.chunks import CHUNK_ELEMENTS
from ray_probe.core.policy.full_vocabulary import BLOCK, block_sums, whole_vocabulary
from ray_probe.core.policy.logits import SamplingRule, exponentials, scaled, widened
from ray_probe.core.policy.nucleus.candidates import Candidates
from ray_probe.core.policy.row_summary import RowSummary
from ray_probe.core.policy.summarize import SummaryScratch, fill

_LARGER_ON_A_GPU = 16


def row_chunks(rows: int, vocabulary: int, device: torch.device) -> Iterator[slice]:
    """Yield chunks of at most `CHUNK_ELEMENTS` logits (16 times that on a GPU).

    A chunk has at least one row.
    """
    factor = 1 if device.type == "cpu" else _LARGER_ON_A_GPU
    size = max(1, factor * CHUNK_ELEMENTS // vocabulary)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


@torch.no_grad()
def sample_rows(
    logits_TV: Tensor, rule: SamplingRule, uniform_T: Tensor, scratch: SummaryScratch | None = None
) -> tuple[Tensor, Tensor, RowSummary]:
    """Draw one token a row from raw logits, without another [T, V] table.

    Args:
        logits_TV: raw logits [T, V].
        rule: temperature and top_p.
        uniform_T: float64 [T] in [0, 1), a random number for each row.
        scratch: memory for tables, to reuse in later calls; None: new memory.

    Returns:
        Tokens [T] int64, never outside the nucleus; their log q [T], nats; the summary of the T rows.
    """
    # The cumulative sum runs in the order of the vocabulary, first over blocks, then inside the block that the random
    # number falls into. The few tokens of a narrow nucleus are sorted into that order.
    rows, vocabulary, device = *logits_TV.shape, logits_TV.device
    dtype, scratch = torch.promote_types(logits_TV.dtype, torch.float32), scratch or SummaryScratch()
    tokens_T, summary = torch.empty(rows, dtype=torch.int64, device=device), RowSummary.empty(rows, dtype, device)
    for chunk in row_chunks(rows, vocabulary, device):
        logits_NV, uniform_N, tokens_N = widened(logits_TV[chunk]), uniform_T[chunk], tokens_T[chunk]
        if rule.top_p >= 1.0:
            summary[chunk], block_NB = whole_vocabulary(logits_NV, rule.temperature, scratch.moments)
            tokens_N.copy_(_in_blocks(logits_NV, summary.largest_T[chunk], rule, block_NB, uniform_N))
        else:
            fill(summary[chunk], logits_NV, rule, scratch, partial(_draw, uniform_N, tokens_N))
    logit_T = logits_TV.gather(-1, tokens_T.unsqueeze(-1)).squeeze(-1).to(dtype)
    log_q_T = scaled(logit_T, summary.largest_T, rule.temperature) - summary.log_norm_T.to(dtype)
    return tokens_T, log_q_T, summary


def _draw(uniform_N: Tensor, tokens_N: Tensor, group: Candidates) -> None:
    """Draw a token for each row of a group into `tokens_N`."""
    mass_NK, share_N = group.mass_NK, uniform_N[group.rows_N]
    if group.columns_NK is None:
        block_N1, share_N = inverse_cdf(block_sums(mass_NK), share_N)
        columns_NK = _columns(block_N1)
        mass_NK = mass_NK.gather(-1, columns_NK.clamp(max=mass_NK.shape[-1] - 1)) * (columns_NK < mass_NK.shape[-1])
    else:
        columns_NK, order_NK = group.columns_NK.sort(dim=-1)
        mass_NK = mass_NK.gather(-1, order_NK)
    inside_N1, _ = inverse_cdf(mass_NK, share_N)
    tokens_N[group.rows_N] = columns_NK.gather(-1, inside_N1).squeeze(-1)


def _in_blocks(logits_NV: Tensor, largest_N: Tensor, rule: SamplingRule, block_NB: Tensor, uniform_N: Tensor) -> Tensor:
    """Draw tokens [N] from the whole vocabulary; reads one block of each row."""
    block_N1, share_N = inverse_cdf(block_NB, uniform_N)
    columns_NK = _columns(block_N1)
    values_NK = logits_NV.gather(-1, columns_NK.clamp(max=logits_NV.shape[-1] - 1))
    mass_NK = exponentials(scaled(values_NK, largest_N.unsqueeze(-1), rule.temperature))
    inside_N1, _ = inverse_cdf(mass_NK * (columns_NK < logits_NV.shape[-1]), share_N)
    return columns_NK.gather(-1, inside_N1).squeeze(-1)


def _columns(block_N1: Tensor) -> Tensor:
    return block_N1 * BLOCK + torch.arange(BLOCK, device=block_N1.device)


def inverse_cdf(mass_NK: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative sum of masses.

    Returns:
        The index [N, 1], and where in that index's own mass the random number falls, 0 to 1 [N].
    """
    cdf_NK = torch.cumsum(mass_NK, dim=-1)
    total_N1 = cdf_NK[..., -1:]
    below_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    point_N1 = torch.minimum(uniform_N.unsqueeze(-1) * total_N1, below_N1)
    index_N1 = torch.searchsorted(cdf_NK, point_N1, right=True)
    own_N1 = mass_NK.gather(-1, index_N1)
    share_N1 = (point_N1 - (cdf_NK.gather(-1, index_N1) - own_N1)) / own_N1
    return index_N1, share_N1.squeeze(-1).clamp_(0.0, 1.0)
