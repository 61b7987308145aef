"""The baseline's target, and the score advantages. numpy only.

Shape suffix: T tokens of one response.
"""

from typing import Literal

import numpy as np

from ray_probe.core.arrays import Array

Estimator = Literal["rb_residual", "naive"]


def future_sum(values_T: Array) -> Array:
    """Sum over k > j of values_k, for every j [T], float64."""
    inclusive_T = np.cumsum(values_T[::-1], dtype=np.float64)[::-1]
    return np.append(inclusive_T[1:], 0.0)


def baseline_target(entropy_T: Array, surprisal_T: Array, estimator: Estimator) -> Array:
    """Return the baseline's target r [T], nats.

    It is the future entropy, or the future surprisal for `naive`.
    """
    return future_sum(entropy_T if estimator == "rb_residual" else surprisal_T)


def advantages(entropy_T: Array, surprisal_T: Array, mu_hat_T: Array, estimator: Estimator) -> Array:
    """Return the score advantages A_j [T], nats.

    They are the return to go less the baseline `b_j = H_j + mu_hat_j`.

    With `rb_residual` the return is `G_j = H_j + r_j`, so `A_j = r_j - mu_hat_j`; with `naive` it is the surprisal to
    go, `sum over k >= j of -log q_k(Y_k)`.
    """
    residual_T: Array = baseline_target(entropy_T, surprisal_T, estimator) - mu_hat_T
    return residual_T if estimator == "rb_residual" else residual_T + surprisal_T - entropy_T
