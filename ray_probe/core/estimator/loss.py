"""Targets, advantages and the loss whose backward pass leaves +grad J.

Shape suffix: T tokens of one response.
"""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

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


def response_loss(log_q_T: Tensor, entropy_T: Tensor | None, advantage_T: Array) -> Tensor:
    """Return `sum_j A_j log q_j(Y_j) + sum_j H_j`, a float64 scalar with graph.

    Args:
        log_q_T: log q of the sampled tokens, with graph.
        entropy_T: entropies with graph (the pathwise term), or None to leave that term out.
        advantage_T: advantages; an array, so no gradient can flow through them.
    """
    score = (torch.from_numpy(advantage_T).to(log_q_T.device) * log_q_T.double()).sum()
    return score if entropy_T is None else score + entropy_T.double().sum()
