"""Logits -> nucleus, q, log q: the one sampling policy that sampling, scoring and features all call.

Shape suffixes: T rows (one a token), V vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 21
_LEAST_LOG_Q = -80.0


@dataclass(frozen=True)
class SamplingRule:
    """What turns logits into the sampling policy: temperature > 0 and 0 < top_p <= 1 (spec section 2)."""

    temperature: float
    top_p: float


@dataclass(frozen=True)
class Policy:
    """The sampling policy of T prefixes; every tensor is float32 or wider and carries no gradient.

    Attributes:
        scaled_TV: logits / temperature less the row's maximum (the shift changes no probability), nats.
        keep_TV: bool, the nucleus S.
        q_TV: probabilities; 0 outside S and below exp(-80), which no sum over a vocabulary can tell from 0.
        log_norm_T: logsumexp of `scaled_TV` over S, nats; `log q = scaled - log_norm` inside S.
        threshold_T: smallest kept `scaled` of each row, nats: S is `scaled >= threshold`.
    """

    scaled_TV: Tensor
    keep_TV: Tensor
    q_TV: Tensor
    log_norm_T: Tensor
    threshold_T: Tensor


def scaled_logits(logits_TV: Tensor, temperature: float) -> Tensor:
    """Logits in float32 or wider less each row's maximum, divided by the temperature [T, V], nats.

    In this order, because logits / temperature can be large: it would round away digits of the difference, or overflow.
    """
    wide_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return (wide_TV - wide_TV.amax(dim=-1, keepdim=True)) / temperature


def nucleus_threshold(scaled_TV: Tensor, top_p: float) -> Tensor:
    """Smallest scaled logit of each row's nucleus [T], nats.

    S is every token such that the total mass of strictly more probable tokens is at most `top_p`, so S is a level
    set and ties stay together. Masses are summed in float64. `top_p = 1` is a branch of its own, because a cumulative
    sum passes 1 by rounding. Source: spec section 2.
    """
    if top_p >= 1.0:
        return torch.full_like(scaled_TV[..., 0], -torch.inf)
    sorted_TV = torch.sort(scaled_TV, dim=-1, descending=True).values
    mass_TV = torch.softmax(sorted_TV, dim=-1, dtype=torch.float64)
    above_TV = torch.cumsum(mass_TV, dim=-1) - mass_TV
    above_TV[..., 0] = 0.0
    return sorted_TV.masked_fill(above_TV > top_p, torch.inf).amin(dim=-1)


def sampling_policy(logits_TV: Tensor, rule: SamplingRule, threshold_T: Tensor | None = None) -> Policy:
    """The sampling policy q of spec section 2 for each row of logits.

    Args:
        logits_TV: raw logits [T, V]; -inf marks a token that cannot occur.
        rule: temperature and top_p.
        threshold_T: the nucleus of an earlier call on the same logits, which is then not searched for again.
    """
    with torch.no_grad():
        scaled_TV = scaled_logits(logits_TV, rule.temperature)
        if threshold_T is None:
            threshold_T = nucleus_threshold(scaled_TV, rule.top_p)
        keep_TV = (scaled_TV >= threshold_T.unsqueeze(-1)) & (scaled_TV > -torch.inf)
        kept_TV = scaled_TV.masked_fill(~keep_TV, -torch.inf)
        log_norm_T = torch.logsumexp(kept_TV, dim=-1)
        log_q_TV = kept_TV - log_norm_T.unsqueeze(-1)
        # Clamped, because exp is slow where it underflows; then 0, because q meets masked logits as large as -3e38.
        q_TV = torch.exp(log_q_TV.clamp(min=_LEAST_LOG_Q)).masked_fill(log_q_TV < _LEAST_LOG_Q, 0.0)
    return Policy(scaled_TV, keep_TV, q_TV, log_norm_T, threshold_T)


def row_chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    """Slices of rows whose [T, V] tables stay below `CHUNK_ELEMENTS` numbers (or hold one row)."""
    size = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(start, start + size) for start in range(0, rows, size))


def sample_rows(logits_TV: Tensor, rule: SamplingRule, uniform_T: Tensor) -> tuple[Tensor, Tensor]:
    """`sample` from raw logits, in row chunks: no [T, V] table is held beyond the logits themselves."""
    parts = [
        sample(sampling_policy(logits_TV[chunk], rule), uniform_T[chunk])
        for chunk in row_chunks(logits_TV.shape[0], logits_TV.shape[-1])
    ]
    tokens, log_q = zip(*parts, strict=True)
    return torch.cat(tokens), torch.cat(log_q)


def sample(policy: Policy, uniform_T: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting q's cumulative sum in float64.

    Args:
        policy: the policy of T prefixes.
        uniform_T: float64 [T] in [0, 1), one number a row that belongs to the row's response.

    Returns:
        tokens [T] int64, never outside the nucleus, and their log q [T], nats.
    """
    cdf_TV = torch.cumsum(policy.q_TV.double(), dim=-1)
    total_T1 = cdf_TV[..., -1:]
    below_T1 = torch.nextafter(total_T1, torch.zeros_like(total_T1))
    point_T1 = torch.minimum(uniform_T.unsqueeze(-1) * total_T1, below_T1)
    tokens_T1 = torch.searchsorted(cdf_TV, point_T1, right=True)
    log_q_T = policy.scaled_TV.gather(-1, tokens_T1).squeeze(-1) - policy.log_norm_T
    return tokens_T1.squeeze(-1), log_q_T


def entropy(policy: Policy) -> Tensor:
    """Entropy of each row's q [T], nats: `logsumexp(a over S) - sum(q * a)`; never below 0."""
    weighted_TV = policy.q_TV * policy.scaled_TV.masked_fill(~policy.keep_TV, 0.0)
    return (policy.log_norm_T - weighted_TV.sum(dim=-1)).clamp(min=0.0)
