"""The parity gate: its statistics add up, its test is the binomial one, and it trips when and only when it should."""

import numpy as np
import pytest
from scipy import stats

from ray_probe.core.estimator.parity import (
    OUTSIDE_SHARE,
    SIGNIFICANCE,
    TOLERANCE_NATS,
    ParityStats,
    binomial_tail,
    violation,
)

BIN_RATIO = 10 ** (1 / 20)


def of_gaps(gaps: np.ndarray, outside: int = 0) -> ParityStats:
    scored_T = np.random.default_rng(0).normal(size=len(gaps))
    signs_T = np.where(np.arange(len(gaps)) % 2, 1.0, -1.0)
    return ParityStats.of(signs_T * gaps, np.zeros_like(scored_T), np.arange(len(gaps)) < outside)


def counted(tokens: int, outside: int = 0, mean_gap: float = 0.0) -> ParityStats:
    zero = ParityStats.zero()
    return ParityStats(tokens, outside, mean_gap * tokens, mean_gap, zero.histogram)


def some_gaps(tokens: int = 5000, seed: int = 1) -> np.ndarray:
    return 10 ** np.random.default_rng(seed).uniform(-12, 2, tokens)


def test_statistics_are_those_of_the_absolute_gaps():
    sampled_T, scored_T = np.array([-1.0, -2.0, -3.0, -0.5]), np.array([-1.5, -2.0, -2.0, -0.5])
    gaps = ParityStats.of(sampled_T, scored_T, np.array([True, False, True, False]))
    assert (gaps.tokens, gaps.outside, gaps.gap_sum, gaps.gap_max) == (4, 2, 1.5, 1.0)
    assert (gaps.mean_gap, gaps.outside_share) == (0.375, 0.5)
    assert gaps.histogram.sum() == 4


def test_statistics_of_parts_add_up_to_those_of_the_whole_in_any_order():
    gaps_T = some_gaps()
    outside_T = np.arange(len(gaps_T)) % 7 == 0
    whole = ParityStats.of(gaps_T, np.zeros_like(gaps_T), outside_T)
    parts = [
        ParityStats.of(gaps_T[part], np.zeros(len(gaps_T[part])), outside_T[part])
        for part in (slice(0, 100), slice(100, 101), slice(101, None))
    ]
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        total = sum((parts[i] for i in order), ParityStats.zero())
        assert (total.tokens, total.outside, total.gap_max) == (whole.tokens, whole.outside, whole.gap_max)
        assert total.gap_sum == pytest.approx(whole.gap_sum, rel=1e-12)
        np.testing.assert_array_equal(total.histogram, whole.histogram)


def test_adding_changes_neither_input():
    first, second = of_gaps(some_gaps(50)), of_gaps(some_gaps(60, seed=2))
    before = first.histogram.copy(), second.histogram.copy()
    (first + second).histogram[:] = -1
    np.testing.assert_array_equal(first.histogram, before[0])
    np.testing.assert_array_equal(second.histogram, before[1])


@pytest.mark.parametrize("tokens", [1, 2, 100, 5000])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 0.999, 1.0])
def test_a_quantile_is_at_most_one_bin_above_the_exact_one(tokens: int, share: float):
    gaps_T = np.maximum(some_gaps(tokens), 1e-10)
    exact = np.quantile(gaps_T, share, method="inverted_cdf")
    assert exact * (1 - 1e-12) <= of_gaps(gaps_T).quantile(share) <= exact * BIN_RATIO * (1 + 1e-12)


def test_quantiles_of_gaps_that_are_nothing_tiny_or_enormous_stay_between_zero_and_the_maximum():
    assert of_gaps(np.zeros(10)).quantile(0.99) == 0.0
    assert of_gaps(np.array([0.0, 0.0, 0.0, 1e-3])).quantile(0.5) == 0.0
    assert of_gaps(np.full(10, 1e-14)).quantile(0.99) == 1e-14
    assert of_gaps(np.full(10, 2e5)).quantile(0.99) == 2e5
    assert of_gaps(np.full(10, np.inf)).quantile(0.99) == np.inf


def test_no_token_has_no_gap_and_no_violation():
    for nothing in (ParityStats.zero(), of_gaps(np.array([])), ParityStats.zero() + ParityStats.zero()):
        assert (nothing.mean_gap, nothing.gap_max, nothing.outside_share, nothing.quantile(0.99)) == (0, 0, 0, 0)
        for dtype in TOLERANCE_NATS:
            assert violation(nothing, dtype, None) is None


BINOMIALS = [(n, share) for n in (0, 1, 7, 1000, 1_000_000) for share in (1e-12, 1e-3, 1e-2, 0.3, 0.999)]


@pytest.mark.parametrize(("trials", "share"), [case for case in BINOMIALS if case[0] * case[1] < 2e4])
def test_the_binomial_tail_is_scipy_s(trials: int, share: float):
    mean, spread = trials * share, np.sqrt(trials * share * (1 - share))
    around = [round(mean + k * spread) for k in (-4, -1, -0.1, 0, 0.1, 1, 3, 6, 20)]
    for successes in sorted({0, 1, *around, trials - 1, trials} & set(range(trials + 1))):
        expected = stats.binom.sf(successes - 1, trials, share)
        assert binomial_tail(successes, trials, share) == pytest.approx(expected, rel=1e-6, abs=1e-12), successes


def test_the_binomial_tail_of_the_extremes_is_certain_or_impossible():
    assert binomial_tail(0, 0, 1e-3) == binomial_tail(0, 10**6, 1e-3) == binomial_tail(-1, 5, 0.5) == 1.0
    assert binomial_tail(6, 5, 0.5) == 0.0
    assert binomial_tail(5, 5, 0.5) == pytest.approx(0.5**5, rel=1e-12)
    assert binomial_tail(10**6, 10**6, 1e-3) == 0.0


def test_a_hopeless_tail_is_answered_without_walking_through_every_token(monkeypatch: pytest.MonkeyPatch):
    from ray_probe.core.estimator import parity

    asked = []
    exact = parity._binomial_term
    monkeypatch.setattr(parity, "_binomial_term", lambda *case: asked.append(case) or exact(*case))
    assert binomial_tail(10**8, 10**9, 1e-3) == 0.0
    assert len(asked) < 10


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-3), ("float64", 1e-3), ("bfloat16", 2e-2)])
def test_the_mean_gap_is_held_to_the_dtype_s_tolerance(dtype: str, tolerance: float):
    assert violation(counted(100, mean_gap=0.99 * tolerance), dtype, None) is None
    assert violation(counted(100, mean_gap=1.01 * tolerance), dtype, None) is not None


def test_a_tolerance_of_the_user_s_replaces_the_dtype_s():
    assert violation(counted(100, mean_gap=0.5), "float32", 0.6) is None
    assert violation(counted(100, mean_gap=1e-4), "float32", 1e-5) is not None


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-3), ("float64", 1e-3), ("bfloat16", 1e-2)])
@pytest.mark.parametrize("tokens", [2, 50, 3000, 400_000])
def test_tokens_outside_the_nucleus_trip_the_gate_only_when_significantly_too_many(
    dtype: str, share: float, tokens: int
):
    assert share == OUTSIDE_SHARE[dtype]
    critical = int(stats.binom.isf(SIGNIFICANCE, tokens, share)) + 1
    assert violation(counted(tokens, min(critical - 1, tokens)), dtype, None) is None
    if critical <= tokens:
        assert violation(counted(tokens, critical), dtype, None) is not None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gap_that_is_no_number_trips_the_gate_whatever_it_is_added_to(bad: float):
    spoilt, fine = of_gaps(np.array([1e-5, bad, 1e-6])), of_gaps(np.full(100_000, 1e-9))
    assert spoilt.histogram.sum() == 3
    for total in (spoilt, spoilt + fine, fine + spoilt):
        assert not np.isfinite(total.gap_max)
        for tolerance in (None, 1e9):
            assert violation(total, "bfloat16", tolerance) is not None


@pytest.mark.parametrize(
    ("gaps", "dtype", "tolerance", "words"),
    [
        (counted(100, mean_gap=0.0125), "float32", None, ("generation.parity_tolerance", "0.0125 nats", "0.001")),
        (counted(100, mean_gap=0.5), "bfloat16", 0.25, ("generation.parity_tolerance", "0.5 nats", "0.25")),
        (counted(1000, mean_gap=np.nan), "float32", None, ("generation.parity_tolerance", "nan", "0.001")),
        (counted(1000, 40), "float32", None, ("generation.top_p", "40 of 1000", "0.1%")),
        (counted(1000, 400), "bfloat16", None, ("generation.top_p", "400 of 1000", "1.0%")),
    ],
)
def test_the_message_is_one_line_with_field_value_and_what_is_allowed(
    gaps: ParityStats, dtype: str, tolerance: float | None, words: tuple[str, ...]
):
    message = violation(gaps, dtype, tolerance)
    assert message is not None and "\n" not in message
    for word in words:
        assert word in message
