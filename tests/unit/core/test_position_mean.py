"""The column position_mean in closed form is the column of a dense fit, for every fold."""

import numpy as np
import pytest

from ray_probe.core.columns import COLUMNS
from ray_probe.core.estimator.baselines import TARGET, BaselineRule
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import (
    Record,
    Shape,
    bin_of,
    by_column_bin,
    column_bin_of,
    packed_size,
    position_bins,
    record_of_tokens,
    total,
)
from ray_probe.core.estimator.ridge import fit, position_means, residual_sum_squares

LAMBDA = 0.3
CAPS = [1, 5, 64, 65, 100, 256, 257, 1000]
FEATURES = ("position_mean", "H", "top1", "margin")


class Rows:
    """Rows of a shard whose target depends on the position and on the features."""

    def __init__(self, seed: int, cap: int, responses: int = 9) -> None:
        numbers = np.random.default_rng(seed)
        lengths = numbers.integers(1, cap + 1, responses)
        self.cap = cap
        self.position_T = np.concatenate([np.arange(length) for length in lengths])
        self.phi_TD = numbers.normal(0.4, 1.0, size=(len(self.position_T), 3))
        noise_T = numbers.normal(size=len(self.position_T))
        self.r_T = 5.0 * np.exp(-self.position_T / cap) + self.phi_TD @ np.array([0.5, -1.0, 0.1]) + noise_T

    @property
    def record(self) -> Record:
        return record_of_tokens(self.phi_TD, self.r_T[:, None], self.position_T, self.cap)


def coarse_bin(position_T: np.ndarray, cap: int) -> np.ndarray:
    return position_T * min(cap, 64) // cap


def dense(parts: list[Rows]) -> tuple[np.ndarray, np.ndarray, float]:
    """Return beta, the means by bin and the residual sum of squares of a fit on the rows themselves."""
    cap = parts[0].cap
    phi_TD, r_T, position_T = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("phi_TD", "r_T", "position_T")
    )
    bins_T, count = coarse_bin(position_T, cap), min(cap, 64)
    weight_C = np.bincount(bins_T, minlength=count)
    mean_C = np.bincount(bins_T, r_T, count) / np.maximum(weight_C, 1)
    phi_TE = np.column_stack([phi_TD, mean_C[bins_T]])
    beta_E = np.linalg.solve(phi_TE.T @ phi_TE + LAMBDA * np.eye(4), phi_TE.T @ r_T)
    return beta_E, mean_C, float(((r_T - phi_TE @ beta_E) ** 2).sum())


@pytest.mark.parametrize("cap", CAPS)
def test_every_fold_has_the_fit_of_its_own_rows(cap: int):
    parts = [Rows(seed, cap) for seed in range(4)]
    rule = BaselineRule("regression", "leave_one_out", LAMBDA, 0.9, FEATURES, cap)
    published = PublishedFit.empty(rule, "policy").after_round(total([p.record for p in parts], rule.shape))
    for number, part in enumerate(parts):
        baseline = published.for_shard(part.record)
        beta_E, mean_C, _ = dense(parts[:number] + parts[number + 1 :])
        np.testing.assert_allclose(baseline.beta_E, beta_E, rtol=1e-9, atol=1e-9)
        expected_T = np.column_stack([part.phi_TD, mean_C[coarse_bin(part.position_T, cap)]]) @ beta_E
        mu_hat_T = baseline.mu_hat("regression", part.position_T, part.phi_TD)
        np.testing.assert_allclose(mu_hat_T, expected_T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("cap", CAPS)
def test_the_global_fit_and_its_residuals_are_the_dense_ones(cap: int):
    parts = [Rows(seed, cap) for seed in range(3)]
    record = total([part.record for part in parts], Shape(3, 1, position_bins(cap)))
    ridge = fit(record, LAMBDA, with_position_mean=True)
    beta_E, mean_C, rss = dense(parts)
    np.testing.assert_allclose(ridge.beta_EK[:, TARGET], beta_E, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(position_means(record)[:, TARGET], mean_C, rtol=1e-12, atol=1e-12)
    assert residual_sum_squares(record, ridge.beta_EK)[TARGET] == pytest.approx(rss, rel=1e-9)


def test_each_of_two_targets_has_its_own_column():
    part = Rows(0, 20)
    both_TK = np.stack([part.r_T, 3.0 - part.r_T**2], axis=1)
    together = fit(record_of_tokens(part.phi_TD, both_TK, part.position_T, 20), LAMBDA, with_position_mean=True)
    for target in range(2):
        part.r_T = both_TK[:, target]
        np.testing.assert_allclose(together.beta_EK[:, target], dense([part])[0], rtol=1e-9)


@pytest.mark.parametrize("cap", CAPS)
def test_its_bins_are_at_most_64_and_nest_in_those_of_the_mean_by_position(cap: int):
    position_T, bins = np.arange(cap), position_bins(cap)
    coarse_T = column_bin_of(bin_of(position_T, cap), bins)
    np.testing.assert_array_equal(coarse_T, coarse_bin(position_T, cap))
    assert coarse_T.max() + 1 == min(cap, 64) == Shape(3, 1, bins).column_bins
    ones_B = np.bincount(bin_of(position_T, cap), minlength=bins).astype(float)
    np.testing.assert_array_equal(by_column_bin(ones_B), np.bincount(coarse_T))


def test_it_is_0_in_a_bin_that_no_record_has_reached():
    short = record_of_tokens(np.ones((2, 3)), np.array([[4.0], [2.0]]), np.array([0, 1]), 5)
    np.testing.assert_array_equal(position_means(short)[:, TARGET], [4.0, 2.0, 0.0, 0.0, 0.0])


def test_it_comes_last_in_a_fit_wherever_it_is_listed():
    rule = BaselineRule("regression", "leave_one_out", LAMBDA, 0.9, FEATURES, 5)
    assert rule.recorded == ("H", "top1", "margin") and rule.fitted == ("H", "top1", "margin", "position_mean")
    assert rule.shape.features == 3


def test_a_fit_without_it_ignores_the_sums_by_position():
    rule = BaselineRule("regression", "leave_one_out", LAMBDA, 0.9, FEATURES[1:], 5)
    baseline = PublishedFit.empty(rule, "policy").after_round(Rows(1, 5).record).for_shard(None)
    assert baseline.column_C is None and rule.fitted == FEATURES[1:]
    assert len(PublishedFit.empty(rule, "policy").after_round(Rows(1, 5).record).ridge.beta_EK) == 3


def test_a_packed_record_of_64_columns_stays_below_100_kilobytes():
    assert len(COLUMNS) <= 64
    assert 8 * packed_size(Shape(64, 1, position_bins(4096)), 16) < 100_000
