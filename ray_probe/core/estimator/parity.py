"""The parity gate: compares the scored policy with the sampling one. numpy only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ray_probe.core.arrays import Array

TOLERANCE_NATS = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 2e-2}
OUTSIDE_SHARE = {"float32": 1e-3, "float64": 1e-3, "bfloat16": 1e-2}
SIGNIFICANCE = 1e-3

_EDGES = np.concatenate([[0.0], np.logspace(-10, 3, 261), [np.inf]])


@dataclass(frozen=True, eq=False)
class ParityStats:
    """Sums over tokens of the gap between log q when sampled and log q when scored.

    Attributes:
        tokens: tokens compared.
        outside: tokens that fell outside the recomputed nucleus.
        gap_sum: sum of absolute gaps, nats.
        gap_max: largest absolute gap, nats.
        histogram: counts by logarithmic bins of the gap, 20 bins a decade, for quantiles in bounded memory.
    """

    tokens: int
    outside: int
    gap_sum: float
    gap_max: float
    histogram: npt.NDArray[np.int64]

    @classmethod
    def zero(cls) -> "ParityStats":
        """The statistics of no token."""
        return cls(0, 0, 0.0, 0.0, np.zeros(len(_EDGES), np.int64))

    @classmethod
    def of(cls, sampled_T: Array, scored_T: Array, outside_T: npt.NDArray[np.bool_]) -> "ParityStats":
        """Compare log q when sampled with log q when scored, nats [T]."""
        gap_T = np.abs(sampled_T - scored_T)
        bins_T = np.clip(np.searchsorted(_EDGES, gap_T, side="left"), 0, len(_EDGES) - 1)
        histogram = np.bincount(bins_T, minlength=len(_EDGES)).astype(np.int64)
        return cls(len(gap_T), int(outside_T.sum()), float(gap_T.sum()), float(gap_T.max(initial=0.0)), histogram)

    def __add__(self, other: "ParityStats") -> "ParityStats":
        return ParityStats(
            self.tokens + other.tokens,
            self.outside + other.outside,
            self.gap_sum + other.gap_sum,
            float(np.maximum(self.gap_max, other.gap_max)),
            self.histogram + other.histogram,
        )

    def to_json(self) -> list[object]:
        """Return the statistics in plain JSON types."""
        return [self.tokens, self.outside, self.gap_sum, self.gap_max, self.histogram.tolist()]

    @classmethod
    def from_json(cls, raw: Sequence[Any]) -> "ParityStats":
        """Read what `to_json` returned."""
        tokens, outside, gap_sum, gap_max, histogram = raw
        return cls(tokens, outside, gap_sum, gap_max, np.array(histogram, np.int64))

    @property
    def mean_gap(self) -> float:
        """Mean absolute gap, nats; 0 for no token."""
        return self.gap_sum / self.tokens if self.tokens else 0.0

    @property
    def outside_share(self) -> float:
        """Share of tokens outside the recomputed nucleus."""
        return self.outside / self.tokens if self.tokens else 0.0

    def quantile(self, share: float) -> float:
        """Return an upper bound of a quantile of the gap, nats; at most `gap_max`.

        It is the upper edge of the histogram bin that holds the quantile.
        """
        if not self.tokens:
            return 0.0
        rank = max(1, math.ceil(share * self.tokens))
        index = int(np.searchsorted(np.cumsum(self.histogram), rank))
        return min(float(_EDGES[index]), self.gap_max)


def binomial_tail(successes: int, trials: int, share: float) -> float:
    """Return P(X >= successes) for X ~ Binomial(trials, share).

    The sum is exact, from the logs of its terms.
    """
    if successes <= 0:
        return 1.0
    if successes <= trials * share:
        return 1.0 - sum(_binomial_term(k, trials, share) for k in range(successes))
    tail = 0.0
    for k in range(successes, trials + 1):
        term = _binomial_term(k, trials, share)
        tail += term
        if term <= 1e-18 * tail:
            break
    return tail


def _binomial_term(k: int, n: int, share: float) -> float:
    log_choose = math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)
    return math.exp(log_choose + k * math.log(share) + (n - k) * math.log1p(-share))


def violation(stats: ParityStats, dtype: str, tolerance_nats: float | None) -> str | None:
    """Why the gate must stop the run, or None.

    Args:
        stats: all tokens so far.
        dtype: the weights' dtype, which sets the default tolerance and the allowed share outside the nucleus.
        tolerance_nats: largest mean gap allowed; None for the dtype's default.
    """
    allowed = TOLERANCE_NATS[dtype] if tolerance_nats is None else tolerance_nats
    if not stats.mean_gap <= allowed:
        return (
            f"generation.parity_tolerance: got a mean gap of {stats.mean_gap:.3g} nats; at most {allowed:g} is allowed"
        )
    share = OUTSIDE_SHARE[dtype]
    if stats.outside_share > share and binomial_tail(stats.outside, stats.tokens, share) < SIGNIFICANCE:
        return (
            f"generation.top_p: got {stats.outside} of {stats.tokens} sampled tokens outside the recomputed nucleus; "
            f"at most {share:.1%} is allowed"
        )
    return None
