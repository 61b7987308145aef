"""The ridge fit on summed statistics. numpy only.

Shape suffixes: D features, K targets.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.records import Record

ILL_CONDITIONED = 1e12
CONSTANT_TARGET = 1e-12


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A fit of the targets on the features.

    Attributes:
        beta_DK: coefficients, nats per unit of each feature.
        condition_number: of Phi^T Phi + lambda I, 2-norm; finite.
        r2_K: centred coefficient of determination on the rows of the fit itself; None where the target is constant.
        ill_conditioned: the condition number is past 1e12.
    """

    beta_DK: Array
    condition_number: float
    r2_K: tuple[float | None, ...]
    ill_conditioned: bool

    def __reduce__(self) -> tuple[Callable[..., "RidgeFit"], tuple[Any, ...]]:
        """Travels as plain bytes, as a record does."""
        beta_DK = self.beta_DK.tobytes(), self.beta_DK.shape
        return _fit_of, (*beta_DK, self.condition_number, self.r2_K, self.ill_conditioned)


def _fit_of(beta_DK: bytes, shape: tuple[int, int], *rest: Any) -> RidgeFit:
    return RidgeFit(np.frombuffer(beta_DK, np.float64).reshape(shape), *rest)


def solve(gram_DD: Array, cross_DK: Array, ridge_lambda: float) -> Array | None:
    """Return `(gram + lambda I)^-1 cross` [D, K], float64; None if it is not finite."""
    if not (np.isfinite(gram_DD).all() and np.isfinite(cross_DK).all()):
        return None
    try:
        beta_DK: Array = np.linalg.solve(gram_DD + ridge_lambda * np.eye(len(gram_DD)), cross_DK).astype(np.float64)
    except np.linalg.LinAlgError:
        return None
    if not np.isfinite(beta_DK).all():
        return None
    beta_DK.flags.writeable = False
    return beta_DK


def residual_sum_squares(record: Record, beta_DK: Array) -> Array:
    """Return the residual sum of squares of each target [K], nats^2.

    It is `r^T r - 2 beta^T Phi^T r + beta^T Phi^T Phi beta`, which needs no row.
    """
    quadratic = np.einsum("dk,de,ek->k", beta_DK, record.gram_DD, beta_DK)
    linear = np.einsum("dk,dk->k", beta_DK, record.cross_DK)
    result: Array = np.diag(record.target_gram_KK) - 2.0 * linear + quadratic
    return result


def fit(record: Record, ridge_lambda: float) -> RidgeFit | None:
    """Fit the record; None where it holds no token or the solve fails."""
    if record.tokens == 0:
        return None
    beta_DK = solve(record.gram_DD, record.cross_DK, ridge_lambda)
    if beta_DK is None:
        return None
    condition = _condition_number(record.gram_DD, ridge_lambda)
    return RidgeFit(beta_DK, condition, _r2(record, beta_DK), condition > ILL_CONDITIONED)


def _condition_number(gram_DD: Array, ridge_lambda: float) -> float:
    """Return the condition number, with eigenvalues below 0 taken as rounding."""
    eigenvalues = np.maximum(np.linalg.eigvalsh(gram_DD), 0.0) + ridge_lambda
    return min(float(eigenvalues[-1]) / float(eigenvalues[0]), float(np.finfo(np.float64).max))


def _r2(record: Record, beta_DK: Array) -> tuple[float | None, ...]:
    """A spread within the rounding of its own sums is that of a constant target."""
    square_K = np.diag(record.target_gram_KK)
    spread_K = square_K - record.target_sum_K**2 / record.weight
    varies_K = np.isfinite(square_K) & (spread_K > CONSTANT_TARGET * square_K)
    rss_K = residual_sum_squares(record, beta_DK)
    return tuple(
        float(1.0 - rss / spread) if varies and np.isfinite(rss) else None
        for rss, spread, varies in zip(rss_K, spread_K, varies_K, strict=True)
    )
