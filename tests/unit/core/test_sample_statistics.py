"""Statistics of a sampled token equal those of scoring it, to the bit."""

import numpy as np
import pytest
import torch
from scipy import stats
from support.full_tables import sampling_policy

from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.sampling import sample_rows
from ray_probe.core.policy.token_statistics import sample_statistics, token_statistics

CAP = 64


def rows_of_all_kinds(vocabulary: int) -> torch.Tensor:
    """Return rows whose nuclei hold from one to nearly all tokens."""
    noise_TV = torch.randn(12, vocabulary, generator=torch.Generator().manual_seed(2))
    return noise_TV * torch.logspace(-2, 1.2, 12)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [1, 12, 3001])
@pytest.mark.parametrize("top_p", [0.5, 0.95, 1.0])
def test_what_comes_with_a_sampled_token_is_what_scoring_it_says(vocabulary: int, top_p: float, dtype: torch.dtype):
    logits_TV, rule = rows_of_all_kinds(vocabulary).to(dtype), SamplingRule(0.8, top_p)
    uniform_T, position_T = torch.linspace(0.0, 0.999, 12, dtype=torch.float64), torch.arange(12)
    tokens_T, sampled = sample_statistics(logits_TV, uniform_T, position_T, rule, CAP, DEFAULT_FEATURES)
    scored = token_statistics(logits_TV, position_T, tokens_T, position_T, rule, CAP, DEFAULT_FEATURES)
    for name, value in vars(scored).items():
        assert torch.equal(getattr(sampled, name), value), name
    assert not sampled.outside_T.any()
    assert torch.equal(tokens_T, sample_rows(logits_TV, rule, uniform_T)[0])
    assert sample_statistics(logits_TV, uniform_T, position_T, rule, CAP)[1].features_TD is None


@pytest.mark.parametrize("top_p", [0.9, 1.0])
@pytest.mark.parametrize("row", [0, 6, 9])
def test_frequencies_over_a_long_row_pass_a_chi_square_test_and_none_lies_outside(row: int, top_p: float):
    draws, rule = 20_000, SamplingRule(0.8, top_p)
    logits_V = rows_of_all_kinds(3001)[row]
    policy = sampling_policy(logits_V[None], rule)
    uniform_T = torch.from_numpy(np.random.default_rng(5).random(draws))
    tokens_T, *_ = sample_rows(logits_V.expand(draws, -1), rule, uniform_T)
    counts_V = np.bincount(tokens_T.numpy(), minlength=3001)
    keep_V, expected_V = policy.keep_TV[0].numpy(), draws * policy.q_TV[0].double().numpy()
    assert not counts_V[~keep_V].any()
    order = np.argsort(expected_V)
    bins = np.searchsorted(np.cumsum(expected_V[order]), np.arange(1, 60) * draws / 60)
    counts, expected = (np.add.reduceat(x[order], np.unique(np.append(0, bins))) for x in (counts_V, expected_V))
    counts, expected = counts[expected > 5], expected[expected > 5]
    assert stats.chisquare(counts, expected * counts.sum() / expected.sum()).pvalue > 1e-3
