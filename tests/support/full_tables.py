"""The sampling policy in full tables [T, V], as a reference for tests.

The nucleus is that of core; all other numbers follow from the tables.

Shape suffixes: T rows (one a token), V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_probe.core.policy.logits import LEAST, SamplingRule, exponentials, scaled, widened
from ray_probe.core.policy.row_summary import RowSummary
from ray_probe.core.policy.sampling import inverse_cdf
from ray_probe.core.policy.summarize import SummaryScratch, fill


@dataclass(frozen=True)
class Policy:
    """The sampling policy of T prefixes, in float32 or wider, without gradient.

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
        """Difference of the two largest kept scaled logits [T], nats; 0 if one is kept."""
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


def summarize(logits_TV: Tensor, rule: SamplingRule) -> RowSummary:
    """Return core's summary of float32 or wider logits, computed as one chunk."""
    summary = RowSummary.empty(len(logits_TV), logits_TV.dtype, logits_TV.device)
    fill(summary, logits_TV, rule, SummaryScratch())
    return summary


def sampling_policy(logits_TV: Tensor, rule: SamplingRule, threshold_T: Tensor | None = None) -> Policy:
    """Return the sampling policy q of each row of logits, in full tables.

    Args:
        logits_TV: raw logits [T, V]; -inf marks a token that cannot occur.
        rule: temperature and top_p.
        threshold_T: `threshold_T` of an earlier call on the same logits, which saves the search; None: search.
    """
    with torch.no_grad():
        wide_TV = widened(logits_TV)
        scaled_TV = scaled(wide_TV, wide_TV.amax(dim=-1, keepdim=True), rule.temperature)
        if threshold_T is None:
            threshold_T = summarize(wide_TV, rule).threshold_T
        keep_TV = (scaled_TV >= threshold_T.unsqueeze(-1)) & (scaled_TV > -torch.inf)
        kept_TV = scaled_TV.masked_fill(~keep_TV, -torch.inf)
        log_norm_T = exponentials(kept_TV).sum(dim=-1).log().to(scaled_TV.dtype)
        log_q_TV = kept_TV - log_norm_T.unsqueeze(-1)
        # Clamped first, because exp is slow where it underflows; then set to 0, because q is multiplied with masked
        # logits as large as -3e38.
        q_TV = torch.exp(log_q_TV.clamp(min=LEAST)).masked_fill(log_q_TV < LEAST, 0.0)
    return Policy(scaled_TV, keep_TV, q_TV, log_norm_T, threshold_T)


def sample(policy: Policy, uniform_T: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row, as `sample_rows` does, by inverting q's cumulative sum.

    Args:
        policy: the policy of T prefixes.
        uniform_T: float64 [T] in [0, 1), a random number for each row.

    Returns:
        tokens [T] int64, never outside the nucleus, and their log q [T], nats.
    """
    tokens_T1, _ = inverse_cdf(policy.q_TV.double(), uniform_T)
    log_q_T = policy.scaled_TV.gather(-1, tokens_T1).squeeze(-1) - policy.log_norm_T
    return tokens_T1.squeeze(-1), log_q_T


def entropy(policy: Policy) -> Tensor:
    """Return the entropy of q [T], nats: `logsumexp(a over S) - sum(q * a)`."""
    weighted_TV = policy.q_TV * policy.scaled_TV.masked_fill(~policy.keep_TV, 0.0)
    return (policy.log_norm_T - weighted_TV.sum(dim=-1)).clamp(min=0.0)
