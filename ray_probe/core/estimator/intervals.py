"""Intervals of 95 % from an estimate and its standard error.

Where clusters are few, an error is itself uncertain: Student's t with clusters - 1 degrees widens the interval. From a
number of clusters on, the normal quantile is used.
"""

import math
from statistics import NormalDist

COVERAGE = 0.95
NORMAL_PROMPTS, NORMAL_SHARDS = 64, 32
"""From these numbers of clusters on the normal quantile is used."""


def quantile(clusters: int, normal: int) -> float:
    """Return the standard errors on each side of an interval of 95 %.

    Args:
        clusters: number of clusters, 2 or more.
        normal: number of clusters from which on the normal quantile is used.
    """
    upper = 0.5 + COVERAGE / 2.0
    return t_quantile(upper, clusters - 1) if clusters < normal else NormalDist().inv_cdf(upper)


def interval(value: float | None, error: float | None, clusters: int, normal: int) -> tuple[float, float] | None:
    """Return the ends of the interval of 95 %; None without a value or an error."""
    if value is None or error is None or clusters < 2:
        return None
    width = quantile(clusters, normal) * error
    return value - width, value + width


def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t above its median, by bisection of the angle.

    With t = sqrt(degrees) tan(angle) the distribution is a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4).

    Args:
        probability: from 0.5 to below 1.
        degrees: of freedom, 1 or more.
    """
    low, high = 0.0, math.pi / 2.0
    while high - low > 1e-15 * high:
        middle = (low + high) / 2.0
        if middle in (low, high):
            break
        if 0.5 + _central(middle, degrees) / 2.0 < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2.0)


def _central(angle: float, degrees: int) -> float:
    """Return P(|T| < sqrt(degrees) tan(angle))."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for power in range(1 + odd, degrees, 2):
        total += term
        term *= cosine**2 * power / (power + 1)
    return 2.0 / math.pi * (angle + sine * total) if odd else sine * total
