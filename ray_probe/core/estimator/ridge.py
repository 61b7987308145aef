"""The ridge fit on summed statistics. numpy only.

The column `position_mean` holds, by position bin, the mean target of the records of the fit itself. So no record can
hold its products: they follow from the sums of features, targets and weights by position bin.

Shape suffixes: D features of a record, E columns of a fit (D, or D + 1 with position_mean), K targets, C coarse
position bins.
"""

from dataclasses import dataclass

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.records import Record, by_column_bin

ILL_CONDITIONED = 1e12
CONSTANT_TARGET = 1e-12


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A fit of the targets on the features.

    Attributes:
        beta_EK: coefficients, nats per unit of each column; with position_mean, its coefficient comes last.
        condition_number: of Phi^T Phi + lambda I, 2-norm; finite; the largest over targets.
        r2_K: centred coefficient of determination on the rows of the fit itself; None where the target is constant.
        ill_conditioned: the condition number is past 1e12.
    """

    beta_EK: Array
    condition_number: float
    r2_K: tuple[float | None, ...]
    ill_conditioned: bool


def position_means(record: Record) -> Array:
    """Return the mean target by coarse position bin [C, K], nats; 0 in an empty one."""
    sum_CK, weight_C1 = by_column_bin(record.bin_sum_BK), by_column_bin(record.bin_weight_B)[:, None]
    return np.divide(sum_CK, weight_C1, out=np.zeros_like(sum_CK), where=weight_C1 > 0)


def normal_equations(record: Record, target: int) -> tuple[Array, Array]:
    """Return Phi^T Phi [E, E] and Phi^T r [E] with position_mean.

    With means mu by position bin, weights c and sums F of features and R of targets by bin, the products of
    position_mean are `sum_c F_cd mu_c`, `sum_c c_c mu_c^2` and `sum_c mu_c R_c`.
    """
    features = len(record.gram_DD)
    mean_C = position_means(record)[:, target]
    gram_EE = np.empty((features + 1, features + 1))
    gram_EE[:features, :features] = record.gram_DD
    gram_EE[features, :features] = gram_EE[:features, features] = mean_C @ record.bin_feature_CD
    gram_EE[features, features] = by_column_bin(record.bin_weight_B) @ mean_C**2
    return gram_EE, np.append(record.cross_DK[:, target], mean_C @ by_column_bin(record.bin_sum_BK)[:, target])


def coefficients(record: Record, ridge_lambda: float, with_position_mean: bool = False) -> Array | None:
    """Return the ridge's coefficients [E, K], float64; None if they are not finite."""
    if not with_position_mean:
        return solve(record.gram_DD, record.cross_DK, ridge_lambda)
    columns = []
    for target in range(record.shape.targets):
        gram_EE, cross_E = normal_equations(record, target)
        column_E1 = solve(gram_EE, cross_E[:, None], ridge_lambda)
        if column_E1 is None:
            return None
        columns.append(column_E1)
    beta_EK = np.concatenate(columns, axis=1)
    beta_EK.flags.writeable = False
    return beta_EK


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


def residual_sum_squares(record: Record, beta_EK: Array) -> Array:
    """Return the residual sum of squares of each target [K], nats^2.

    It is `r^T r - 2 beta^T Phi^T r + beta^T Phi^T Phi beta`, which needs no row.
    """
    square_K = np.diag(record.target_gram_KK)
    if len(beta_EK) == len(record.gram_DD):
        quadratic_K = np.einsum("dk,de,ek->k", beta_EK, record.gram_DD, beta_EK)
        return np.asarray(square_K - 2.0 * np.einsum("dk,dk->k", beta_EK, record.cross_DK) + quadratic_K)
    residual_K = square_K.copy()
    for target, beta_E in enumerate(beta_EK.T):
        gram_EE, cross_E = normal_equations(record, target)
        residual_K[target] += beta_E @ gram_EE @ beta_E - 2.0 * beta_E @ cross_E
    return residual_K


def fit(record: Record, ridge_lambda: float, with_position_mean: bool = False) -> RidgeFit | None:
    """Fit the record; None where it holds no token or the solve fails."""
    if record.tokens == 0:
        return None
    beta_EK = coefficients(record, ridge_lambda, with_position_mean)
    if beta_EK is None:
        return None
    grams = [record.gram_DD]
    if with_position_mean:
        grams = [normal_equations(record, target)[0] for target in range(record.shape.targets)]
    condition = max(_condition_number(gram_EE, ridge_lambda) for gram_EE in grams)
    return RidgeFit(beta_EK, condition, _r2(record, beta_EK), condition > ILL_CONDITIONED)


def _condition_number(gram_EE: Array, ridge_lambda: float) -> float:
    """Return the condition number, with eigenvalues below 0 taken as rounding."""
    eigenvalues = np.maximum(np.linalg.eigvalsh(gram_EE), 0.0) + ridge_lambda
    return min(float(eigenvalues[-1]) / float(eigenvalues[0]), float(np.finfo(np.float64).max))


def _r2(record: Record, beta_EK: Array) -> tuple[float | None, ...]:
    """A spread within the rounding of its own sums is that of a constant target."""
    square_K = np.diag(record.target_gram_KK)
    spread_K = square_K - record.target_sum_K**2 / record.weight
    varies_K = np.isfinite(square_K) & (spread_K > CONSTANT_TARGET * square_K)
    rss_K = residual_sum_squares(record, beta_EK)
    return tuple(
        float(1.0 - rss / spread) if varies and np.isfinite(rss) else None
        for rss, spread, varies in zip(rss_K, spread_K, varies_K, strict=True)
    )
