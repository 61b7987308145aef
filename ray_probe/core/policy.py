"""Samples tokens from logits by the one policy that sampling, scoring and features share.

`sample_rows` draws from each nucleus as the search of `ray_probe.core.summarize` finds it, so sampling and scoring use
the same nucleus. `sampling_policy` gives the policy in full tables.

Shape suffixes: T rows (one a token), V vocabulary, N some rows, K candidates, B blocks of the vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ray_probe.core.full_vocabulary import BLOCK, block_sums, whole_vocabulary
from ray_probe.core.nucleus import Candidates
from ray_probe.core.row_summary import RowSummary
from ray_probe.core.scaling import LEAST, SamplingRule, exponentials, scaled, scaled_logits, widened
from ray_probe.core.summarize import SummaryScratch, fill, summarize

__all__ = [
    "Policy",
    "SamplingRule",
    "entropy",
    "row_chunks",
    "sample",
    "sample_rows",
    "sample_summaries",
    "sampling_policy",
]

CHUNK_ELEMENTS = 1 << 20  # logits of a chunk of rows
_LARGER_ON_A_GPU = 16


@dataclass(frozen=True)
class Policy:
    """The sampling policy of T prefixes in full; every tensor is float32 or wider and carries no gradient.

    Attributes:
        scaled_TV: (logits - the row's maximum) / temperature, nats; the shift changes no probability.
        keep_TV: bool, the nucleus S.
        q_TV: probabilities; 0 outside S and below exp(-80).
        log_norm_T: logsumexp of `scaled_TV` over S, nats; `log q = scaled - log_norm` inside S.
        threshold_T: smallest kept `scaled` of each row, nats: S is `scaled >= threshold`.
    """

    scaled_TV: Tensor
    keep_TV: Tensor
    q_TV: Tensor
    log_norm_T: Tensor
    threshold_T: Tensor

    @property
    def top1_T(self) -> Tensor:
        """Largest probability in q [T]."""
        return self.q_TV.amax(dim=-1)

    @property
    def margin_T(self) -> Tensor:
        """Difference of the two largest kept scaled logits [T], nats; 0 where one token is kept."""
        kept_TV = self.scaled_TV.masked_fill(~self.keep_TV, -torch.inf)
        if kept_TV.shape[-1] < 2:
            return torch.zeros_like(self.log_norm_T)
        top_T2 = kept_TV.topk(2, dim=-1).values
        difference_T = top_T2[..., 0] - top_T2[..., 1]
        return torch.where(torch.isfinite(difference_T), difference_T, torch.zeros_like(difference_T))

    @property
    def tail_mass_T(self) -> Tensor:
        """Mass of the full softmax outside S [T]."""
        full_TV = torch.softmax(self.scaled_TV, dim=-1)
        return full_TV.masked_fill(self.keep_TV, 0.0).sum(dim=-1)

    @property
    def logit_var_T(self) -> Tensor:
        """Variance of the scaled logits under q [T], nats^2."""
        kept_TV = self.scaled_TV.masked_fill(self.q_TV == 0, 0.0)
        mean_T1 = (self.q_TV * kept_TV).sum(dim=-1, keepdim=True)
        return (self.q_TV * (kept_TV - mean_T1).square()).sum(dim=-1)


def sampling_policy(logits_TV: Tensor, rule: SamplingRule, threshold_T: Tensor | None = None) -> Policy:
    """Return the sampling policy q of spec section 2 for each row of logits, in full tables.

    Args:
        logits_TV: raw logits [T, V]; -inf marks a token that cannot occur.
        rule: temperature and top_p.
        threshold_T: `threshold_T` of an earlier call on the same logits, which spares the search; None: search.
    """
    with torch.no_grad():
        scaled_TV = scaled_logits(logits_TV, rule.temperature)
        if threshold_T is None:
            threshold_T = summarize(widened(logits_TV), rule).threshold_T
        keep_TV = (scaled_TV >= threshold_T.unsqueeze(-1)) & (scaled_TV > -torch.inf)
        kept_TV = scaled_TV.masked_fill(~keep_TV, -torch.inf)
        log_norm_T = exponentials(kept_TV).sum(dim=-1).log().to(scaled_TV.dtype)
        log_q_TV = kept_TV - log_norm_T.unsqueeze(-1)
        # Clamped first, because exp is slow where it underflows; then set to 0, because q is multiplied with masked
        # logits as large as -3e38.
        q_TV = torch.exp(log_q_TV.clamp(min=LEAST)).masked_fill(log_q_TV < LEAST, 0.0)
    return Policy(scaled_TV, keep_TV, q_TV, log_norm_T, threshold_T)


def row_chunks(rows: int, vocabulary: int, device: torch.device | None = None) -> Iterator[slice]:
    """Yield slices of rows whose tables hold at most `CHUNK_ELEMENTS` logits (or one row); 16 times that on a GPU."""
    factor = 1 if device is None or device.type == "cpu" else _LARGER_ON_A_GPU
    size = max(1, factor * CHUNK_ELEMENTS // vocabulary)
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def sample(policy: Policy, uniform_T: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting q's cumulative sum in float64; `sample_rows` does the same without tables.

    Args:
        policy: the policy of T prefixes.
        uniform_T: float64 [T] in [0, 1), a random number for each row.

    Returns:
        tokens [T] int64, never outside the nucleus, and their log q [T], nats.
    """
    tokens_T1, _ = _inverse(policy.q_TV.double(), uniform_T)
    log_q_T = policy.scaled_TV.gather(-1, tokens_T1).squeeze(-1) - policy.log_norm_T
    return tokens_T1.squeeze(-1), log_q_T


def sample_rows(logits_TV: Tensor, rule: SamplingRule, uniform_T: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row from raw logits; holds no other [T, V] table.

    Args:
        logits_TV: raw logits [T, V].
        rule: temperature and top_p.
        uniform_T: float64 [T] in [0, 1), a random number for each row.

    Returns:
        tokens [T] int64, never outside the nucleus, and their log q [T], nats.
    """
    tokens_T, log_q_T, _ = sample_summaries(logits_TV, rule, uniform_T)
    return tokens_T, log_q_T


@torch.no_grad()
def sample_summaries(
    logits_TV: Tensor, rule: SamplingRule, uniform_T: Tensor, scratch: SummaryScratch | None = None
) -> tuple[Tensor, Tensor, RowSummary]:
    """Draw one token a row as `sample_rows` does, and summarize the rows by the same search for the nucleus.

    Args:
        logits_TV: raw logits [T, V].
        rule: temperature and top_p.
        uniform_T: float64 [T] in [0, 1), a random number for each row.
        scratch: memory for tables, which a caller may keep for later calls; None: new memory.

    Returns:
        tokens [T] int64, their log q [T], nats, and the summary of the T rows.
    """
    # The cumulative sum runs through the vocabulary in its order: first by blocks, then inside the one block that the
    # random number falls into. The few tokens of a narrow nucleus are sorted into that order.
    rows, vocabulary, device = *logits_TV.shape, logits_TV.device
    dtype, scratch = torch.promote_types(logits_TV.dtype, torch.float32), scratch or SummaryScratch()
    tokens_T, summary = torch.empty(rows, dtype=torch.int64, device=device), RowSummary.empty(rows, dtype, device)
    for chunk in row_chunks(rows, vocabulary, device):
        logits_NV, uniform_N, tokens_N = widened(logits_TV[chunk]), uniform_T[chunk], tokens_T[chunk]
        if rule.top_p >= 1.0:
            part, block_NB = whole_vocabulary(logits_NV, rule.temperature, scratch.moments)
            summary[chunk].put(None, part)
            tokens_N.copy_(_in_blocks(logits_NV, part.largest_T, rule, block_NB, uniform_N))
        else:
            fill(summary[chunk], logits_NV, rule, scratch, partial(_draw, uniform_N, tokens_N))
    logit_T = logits_TV.gather(-1, tokens_T.unsqueeze(-1)).squeeze(-1).to(dtype)
    log_q_T = scaled(logit_T, summary.largest_T, rule.temperature) - summary.log_norm_T.to(dtype)
    return tokens_T, log_q_T, summary


def _draw(uniform_N: Tensor, tokens_N: Tensor, group: Candidates) -> None:
    """Draw a token for each row of a group and write it into `tokens_N`."""
    mass_NK, share_N = group.mass_NK, uniform_N[group.rows_N]
    if group.columns_NK is None:
        block_N1, share_N = _inverse(block_sums(mass_NK), share_N)
        columns_NK = _columns(block_N1)
        mass_NK = mass_NK.gather(-1, columns_NK.clamp(max=mass_NK.shape[-1] - 1)) * (columns_NK < mass_NK.shape[-1])
    else:
        columns_NK, order_NK = group.columns_NK.sort(dim=-1)
        mass_NK = mass_NK.gather(-1, order_NK)
    inside_N1, _ = _inverse(mass_NK, share_N)
    tokens_N[group.rows_N] = columns_NK.gather(-1, inside_N1).squeeze(-1)


def _in_blocks(logits_NV: Tensor, largest_N: Tensor, rule: SamplingRule, block_NB: Tensor, uniform_N: Tensor) -> Tensor:
    """Draw tokens [N] from the whole vocabulary, given the masses of its blocks; reads one block of each row."""
    block_N1, share_N = _inverse(block_NB, uniform_N)
    columns_NK = _columns(block_N1)
    values_NK = logits_NV.gather(-1, columns_NK.clamp(max=logits_NV.shape[-1] - 1))
    mass_NK = exponentials(scaled(values_NK, largest_N.unsqueeze(-1), rule.temperature))
    inside_N1, _ = _inverse(mass_NK * (columns_NK < logits_NV.shape[-1]), share_N)
    return columns_NK.gather(-1, inside_N1).squeeze(-1)


def _columns(block_N1: Tensor) -> Tensor:
    return block_N1 * BLOCK + torch.arange(BLOCK, device=block_N1.device)


def _inverse(mass_NK: Tensor, uniform_N: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative sum of masses: return the index [N, 1] and the place within its own mass, in [0, 1] [N]."""
    cdf_NK = torch.cumsum(mass_NK, dim=-1)
    total_N1 = cdf_NK[..., -1:]
    below_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    point_N1 = torch.minimum(uniform_N.unsqueeze(-1) * total_N1, below_N1)
    index_N1 = torch.searchsorted(cdf_NK, point_N1, right=True)
    own_N1 = mass_NK.gather(-1, index_N1)
    share_N1 = (point_N1 - (cdf_NK.gather(-1, index_N1) - own_N1)) / own_N1
    return index_N1, share_N1.squeeze(-1).clamp_(0.0, 1.0)


def entropy(policy: Policy) -> Tensor:
    """Return the entropy of each row's q [T], nats, `logsumexp(a over S) - sum(q * a)`; never below 0."""
    weighted_TV = policy.q_TV * policy.scaled_TV.masked_fill(~policy.keep_TV, 0.0)
    return (policy.log_norm_T - weighted_TV.sum(dim=-1)).clamp(min=0.0)
