"""Clustered standard errors, and the noise of advantages and gradient. numpy only.

Shape suffixes: C clusters (prompts or shards); a leading `...` stands for independent replicates.
"""

from dataclasses import dataclass

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import TARGET
from ray_probe.core.estimator.modes import MODES, Mode
from ray_probe.core.estimator.records import Record
from ray_probe.core.estimator.ridge import residual_sum_squares


def clustered_ratio(numerator_C: Array, denominator_C: Array) -> tuple[Array, Array]:
    """Return a ratio of sums and its standard error clustered by unit (delta method).

    With `denominator` the responses of each prompt this is a mean over responses, with their lengths it is a mean
    over tokens. The error carries the usual C / (C - 1) and is NaN for fewer than two clusters.

    Args:
        numerator_C: total of each cluster [..., C].
        denominator_C: size of each cluster [..., C].

    Returns:
        ratio [...] and standard error [...], in the numerator's unit over the denominator's.
    """
    clusters = numerator_C.shape[-1]
    size = denominator_C.sum(axis=-1)
    ratio = numerator_C.sum(axis=-1) / size
    residual_C = numerator_C - ratio[..., None] * denominator_C
    if clusters < 2:
        return ratio, np.full_like(ratio, np.nan)
    spread = (residual_C**2).sum(axis=-1) * clusters / (clusters - 1)
    return ratio, np.sqrt(spread) / size


def within_scatter(rows_P3: Array, squares_P3: Array) -> Array:
    """Return the scatter of entropy and length within uses of a prompt [3].

    For a use with G responses it is `G / (G - 1)` times the sums of squares and products about its means: HH (nats^2),
    HT (nats tokens) and TT (tokens^2). NaN where a use has one response.

    Args:
        rows_P3: for each use: responses, total entropy, total length.
        squares_P3: for each use: sums of H^2, H T and T^2 over its responses.
    """
    responses_P, entropy_P, tokens_P = rows_P3.T
    products_P3 = np.stack([entropy_P**2, entropy_P * tokens_P, tokens_P**2], axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        factor_P = responses_P / (responses_P - 1.0)
        scatter_P3 = factor_P[:, None] * (squares_P3 - products_P3 / responses_P[:, None])
    scatter: Array = scatter_P3.sum(axis=0)
    return scatter


def errors_within(scatter_3: Array, entropy: float, responses: float, tokens: float) -> tuple[float, float]:
    """Return the errors per sequence and per token for these very prompts.

    Args:
        scatter_3: of `within_scatter`.
        entropy: total over responses, nats.
        responses: number of responses.
        tokens: number of tokens.
    """
    ratio = entropy / tokens
    residual = scatter_3[0] - 2.0 * ratio * scatter_3[1] + ratio**2 * scatter_3[2]
    # Rounding can leave a scatter of equal responses below 0.
    squares = np.maximum([scatter_3[0], residual], 0.0)
    return float(np.sqrt(squares[0]) / responses), float(np.sqrt(squares[1]) / tokens)


@dataclass(frozen=True)
class GradientNoise:
    """The mean gradient's norm and noise; None where no two parts are independent.

    Attributes:
        norm_raw: Euclidean norm of the mean gradient: too large by its own noise.
        norm_debiased: root of `norm_sq_debiased`; None also where that is not above 0.
        norm_sq_debiased: unbiased estimate of the squared norm of the expected gradient; may be negative.
        trace_cov: N times the trace of the covariance of the mean.
        snr: `norm_sq_debiased / (trace_cov / N)`; None also when trace_cov is not positive.
    """

    norm_raw: float
    norm_debiased: float | None
    norm_sq_debiased: float | None
    trace_cov: float | None
    snr: float | None


def noise_of_products(sum_norm_sq: float, sequences: float, cross: float, pairs: float) -> GradientNoise:
    """Return the noise of the reduced gradient from products of independent parts.

    For parts with `E g_s = n_s mu`, of which one's fit does not hold the other, a product has the expectation
    `n_s n_t |mu|^2`.

    Args:
        sum_norm_sq: squared norm of the gradient summed over all responses.
        sequences: number of responses N.
        cross: sum over pairs of parts of the products of their gradients.
        pairs: sum over these pairs of the products of their numbers of responses.
    """
    mean_sq = sum_norm_sq / sequences**2
    norm_raw = float(np.sqrt(mean_sq))
    if not pairs > 0:
        return GradientNoise(norm_raw, None, None, None, None)
    debiased = cross / pairs
    variance = mean_sq - debiased
    snr = debiased / variance if variance > 0 else None
    norm_debiased = float(np.sqrt(debiased)) if debiased > 0 else None
    return GradientNoise(norm_raw, norm_debiased, debiased, sequences * variance, snr)


def gradient_noise(sum_norm_sq: float, shard_norm_sq_C: Array, shard_sequences_C: Array) -> GradientNoise:
    """Return the noise of the reduced gradient from products of all pairs of shards.

    It is unbiased where no shard's fit holds another of the same round: for `lagged`, or without a fit. With
    `leave_one_out` the norm is too large, at an order of 1 / S^2 in the shards S of a round. Shards that share a prompt
    are not independent at all.

    Args:
        sum_norm_sq: squared norm of the gradient summed over all responses.
        shard_norm_sq_C: squared norm of each shard's own sum.
        shard_sequences_C: responses in each shard.
    """
    sequences = float(shard_sequences_C.sum())
    cross = (sum_norm_sq - float(shard_norm_sq_C.sum())) / 2.0
    pairs = (sequences**2 - float((shard_sequences_C**2).sum())) / 2.0
    return noise_of_products(sum_norm_sq, sequences, cross, pairs if len(shard_norm_sq_C) > 1 else 0.0)


def in_sample_mean_squares(record: Record, position_mean_B: Array, beta_EK: Array | None) -> dict[Mode, float | None]:
    """Return the mean squared residual by mode, nats^2 per token; None without tokens.

    The residuals are those of the fit's own rows, which flatters the fit: label them `in_sample`.

    Args:
        record: everything that the fit is made of.
        position_mean_B: the fit of `residual_mu`, nats.
        beta_EK: the fit of `regression`, or None where `residual_mu` stands in for it.
    """
    if record.tokens == 0:
        return dict.fromkeys(MODES)
    square = float(record.target_gram_KK[TARGET, TARGET])
    sums_B, weight_B = record.bin_sum_BK[:, TARGET], record.bin_weight_B
    by_position = square - 2.0 * float(position_mean_B @ sums_B) + float(weight_B @ position_mean_B**2)
    totals: dict[Mode, float] = {
        "none": square,
        "constant": square - float(record.target_sum_K[TARGET]) ** 2 / record.weight,
        "residual_mu": by_position,
        "regression": by_position if beta_EK is None else float(residual_sum_squares(record, beta_EK)[TARGET]),
    }
    return {mode: max(value, 0.0) / record.weight for mode, value in totals.items()}
