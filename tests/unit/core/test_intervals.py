"""Quantiles of Student's t are the tabulated ones, and intervals hold the truth as often as they say."""

from statistics import NormalDist

import numpy as np
import pytest

from ray_probe.core.estimator.intervals import NORMAL_PROMPTS, NORMAL_SHARDS, interval, quantile, t_quantile
from ray_probe.core.estimator.variance import clustered_ratio, errors_within, within_scatter

TABULATED = {
    1: 12.7062047, 2: 4.3026527, 3: 3.1824463, 4: 2.7764451, 5: 2.5705818, 7: 2.3646243, 10: 2.2281389, 15: 2.1314495,
    30: 2.0422725, 62: 1.9989715,
}  # fmt: skip


@pytest.mark.parametrize("degrees", TABULATED)
def test_a_quantile_of_student_is_the_tabulated_one(degrees: int):
    assert t_quantile(0.975, degrees) == pytest.approx(TABULATED[degrees], abs=1e-6)


def test_other_probabilities_and_the_limit_are_right_too():
    assert t_quantile(0.5, 3) == pytest.approx(0.0, abs=1e-9)
    assert t_quantile(0.995, 9) == pytest.approx(3.2498355, abs=1e-6)
    assert t_quantile(0.975, 5000) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-3)


def test_few_clusters_take_student_and_many_the_normal_quantile():
    normal = NormalDist().inv_cdf(0.975)
    assert (NORMAL_PROMPTS, NORMAL_SHARDS) == (64, 32)
    for limit in (NORMAL_PROMPTS, NORMAL_SHARDS):
        assert quantile(limit, limit) == normal
        assert quantile(limit - 1, limit) == t_quantile(0.975, limit - 2) > normal
    assert interval(5.0, 0.5, 8, 32) == pytest.approx((5.0 - 2.3646243 * 0.5, 5.0 + 2.3646243 * 0.5), abs=1e-6)
    assert interval(None, 0.5, 8, 32) is interval(5.0, None, 8, 32) is interval(5.0, 0.0, 1, 32) is None


def test_intervals_of_16_prompts_hold_the_truth_95_times_in_100():
    """The normal quantile, which they had, holds it 93 times (measured: 0.931)."""
    numbers = np.random.default_rng(0)
    prompt_RP = numbers.normal(0.0, 1.0, (20_000, 16))
    entropy_RP = 4 * (10.0 + prompt_RP) + numbers.normal(0.0, 2.0, (20_000, 16))
    value_R, error_R = clustered_ratio(entropy_RP, np.full((20_000, 16), 4.0))
    covered = {
        normal: np.mean(np.abs(value_R - 10.0) <= quantile(16, normal) * error_R) for normal in (NORMAL_PROMPTS, 16)
    }
    assert 0.945 < covered[NORMAL_PROMPTS] < 0.955
    assert covered[16] < 0.935


def test_the_error_for_these_very_prompts_is_the_spread_over_their_responses():
    """Prompts stay, responses are drawn anew: the spread of the estimate is its error within."""
    numbers, runs, prompts, group = np.random.default_rng(1), 4000, 6, 3
    level_P, length_P = numbers.uniform(3, 16, prompts), numbers.integers(5, 30, prompts)
    tokens = numbers.poisson(length_P[:, None], (runs, prompts, group)) + 1.0
    entropy = level_P[:, None] + 0.3 * tokens + numbers.normal(0.0, 1.0, tokens.shape)
    rows = np.stack([np.full((runs, prompts), group), entropy.sum(-1), tokens.sum(-1)], axis=-1)
    squares = np.stack([(entropy**2).sum(-1), (entropy * tokens).sum(-1), (tokens**2).sum(-1)], axis=-1)
    errors = np.array([
        errors_within(within_scatter(row, square), *row.sum(axis=0)[[1, 0, 2]])
        for row, square in zip(rows, squares, strict=True)
    ])  # fmt: skip
    per_sequence, per_token = entropy.sum((1, 2)) / (prompts * group), entropy.sum((1, 2)) / tokens.sum((1, 2))
    assert np.sqrt((errors[:, 0] ** 2).mean()) == pytest.approx(per_sequence.std(), rel=0.03)
    assert np.sqrt((errors[:, 1] ** 2).mean()) == pytest.approx(per_token.std(), rel=0.03)


def test_one_response_a_prompt_has_no_error_within():
    rows, squares = np.array([[1.0, 4.0, 2.0]]), np.array([[16.0, 8.0, 4.0]])
    assert np.isnan(within_scatter(rows, squares)).all()
