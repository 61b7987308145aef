"""Checks by which the fitter refuses records of no shard. numpy only."""

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.records import (
    SCHEMA_VERSION,
    Record,
    Shape,
    by_column_bin,
    packed_size,
    refuse_unless_whole,
)
from ray_probe.errors import RecordError

MOST_SHARD_PROMPTS = 65_536
LARGEST = 1e150
"""No sum over tokens comes near it, and squares and totals of smaller numbers stay finite."""


def check_packed(packed: Array, shape: Shape) -> None:
    """Refuse an unread vector of the wrong type or length. Raises RecordError.

    The limit is twice the size of the sums, plus a table of more prompts than any shard should have.
    """
    if not isinstance(packed, np.ndarray) or packed.ndim != 1 or packed.dtype != np.float64:
        raise RecordError(f"record: need a float64 vector of schema version {SCHEMA_VERSION}")
    most = packed_size(shape, 0) + packed_size(shape, MOST_SHARD_PROMPTS)
    if len(packed) > most:
        raise RecordError(f"record: got {len(packed)} numbers; this run's have at most {most}; it was not merged")


def check(record: Record, shape: Shape) -> None:
    """Refuse a record that no shard can have made. Raises RecordError with the reason."""
    if record.shape != shape:
        raise RecordError(f"record: got {record.shape}; the run has {shape}")
    if not (np.abs(record.pack()) <= LARGEST).all():
        raise RecordError(f"record: holds NaN or infinity, or a number past {LARGEST:g}; it was not merged")
    if record.sequences < 1 or record.tokens < record.sequences:
        raise RecordError(f"record: got {record.sequences} sequences with {record.tokens} tokens; need 1 token each")
    _check_prompts(record)
    _check_weights(record)
    _check_products(record)
    _check_bin_features(record)


def _check_prompts(record: Record) -> None:
    responses_P, _, tokens_P = record.prompt_rows_P3.T
    refuse_unless_whole(record.prompt_rows_P3[:, [0, 2]])
    if (responses_P < 1).any() or responses_P.sum() != record.sequences or tokens_P.sum() != record.tokens:
        raise RecordError("record: the counts of its prompts do not add up to its own; it was not merged")
    if (tokens_P < responses_P).any() or (record.prompt_ids_P[1:] <= record.prompt_ids_P[:-1]).any():
        raise RecordError("record: its prompts are not ascending, with 1 token a response each; it was not merged")


def _check_weights(record: Record) -> None:
    if not record.weight > 0 or (record.bin_weight_B < 0).any():
        raise RecordError(f"record: got a weight of {record.weight:g}, or a negative one in a bin; need more than 0")
    if abs(record.bin_weight_B.sum() - record.weight) > 1e-9 * record.weight:
        raise RecordError("record: the weights of its position bins do not add up to its own; it was not merged")


def _check_products(record: Record) -> None:
    """Check that [Phi R]^T W [Phi R] is symmetric and positive semi-definite."""
    gram_DD, cross_DK, target_gram_KK = record.gram_DD, record.cross_DK, record.target_gram_KK
    features = len(gram_DD)
    both = np.empty((features + len(target_gram_KK),) * 2)
    both[:features, :features], both[features:, features:] = gram_DD, target_gram_KK
    both[:features, features:], both[features:, :features] = cross_DK, cross_DK.T
    squares = [("Phi^T Phi", gram_DD), ("R^T R", target_gram_KK), ("[Phi R]^T [Phi R]", both)]
    for name, square in squares:
        diagonal = square.diagonal()
        if np.abs(square - square.T).max(initial=0.0) > 1e-12 * np.abs(diagonal).sum():
            raise RecordError(f"record: {name} is not symmetric; it was not merged")
        if diagonal.min(initial=0.0) < 0:
            raise RecordError(f"record: {name} has a negative diagonal: not positive semi-definite; it was not merged")
    least = [-1e-8 * square.trace() for _, square in squares]
    if both.size and np.linalg.eigvalsh(both)[0] >= max(least):
        return  # nor has a block on its diagonal a smaller eigenvalue (Cauchy's interlacing theorem)
    for (name, square), limit in zip(squares, least, strict=True):
        if square.size and np.linalg.eigvalsh(square)[0] < limit:
            raise RecordError(f"record: {name} is not positive semi-definite; it was not merged")


def _check_bin_features(record: Record) -> None:
    """Check the features' sums by position against their squares (Cauchy-Schwarz)."""
    weight_C = by_column_bin(record.bin_weight_B)
    if (record.bin_feature_CD[weight_C == 0] != 0).any():
        raise RecordError("record: holds features in a position bin without a token; it was not merged")
    least_D = (record.bin_feature_CD**2 / np.maximum(weight_C, 1e-300)[:, None]).sum(axis=0)
    if (least_D > record.gram_DD.diagonal() * (1 + 1e-9)).any():
        raise RecordError("record: the sums of its features by position exceed their squares; it was not merged")
