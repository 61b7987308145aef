"""Random logits, and their scores as the rows of one table."""

from collections.abc import Sequence

import torch

from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.token_statistics import TokenStatistics, token_statistics

CAP = 64


def some_logits(rows: int = 8, vocabulary: int = 12, seed: int = 0) -> torch.Tensor:
    """Return random logits [rows, vocabulary], float64."""
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)


def score(
    logits_TV: torch.Tensor, tokens_T: torch.Tensor, rule: SamplingRule, features: Sequence[str] = ()
) -> TokenStatistics:  # fmt: skip
    """Score one token a row."""
    rows_T = torch.arange(len(tokens_T))
    return token_statistics(logits_TV, rows_T, tokens_T, rows_T, rule, CAP, features)
