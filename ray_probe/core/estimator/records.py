"""The additive record of a shard: all that an actor sends for the fit. numpy only.

Records add, subtract and have a zero. They hold sums, so only their table of prompts grows, which errors clustered by
prompt need.

Shape suffixes: T tokens, D features, K targets (1 today: the future entropy r), B position bins, C position bins of the
sums of features, P prompts.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Self

import numpy as np
import numpy.typing as npt

from ray_probe.core.arrays import Array, IntArray
from ray_probe.errors import RecordError

SCHEMA_VERSION = 2
MAX_POSITION_BINS = 256
MAX_COLUMN_BINS = 64
PROMPT_COLUMNS = ("responses", "entropy", "tokens")
_HEADER = 5
_COUNTS = 3
_LARGEST_WHOLE = 2.0**53


def position_bins(cap: int) -> int:
    """Return the number of equal position bins for `cap` tokens: `min(cap, 256)`."""
    return min(cap, MAX_POSITION_BINS)


def bin_of(position_T: IntArray, cap: int) -> IntArray:
    """Position bin of each token [T], from 0."""
    return position_T * position_bins(cap) // cap


@dataclass(frozen=True)
class Shape:
    """Sizes that fix a record's arrays: D features, K targets, B position bins."""

    features: int
    targets: int
    bins: int

    @property
    def column_bins(self) -> int:
        """C: position bins of the sums of features. Each holds whole position bins."""
        return min(self.bins, MAX_COLUMN_BINS)


def column_bin_of(bin_B: IntArray, bins: int) -> IntArray:
    """Return the bin among C of position bins among `bins`."""
    return bin_B * min(bins, MAX_COLUMN_BINS) // bins


def by_column_bin(values_BX: Array) -> Array:
    """Return the sums over the position bins of each coarse bin [C, ...]."""
    bins = len(values_BX)
    starts = np.searchsorted(column_bin_of(np.arange(bins), bins), np.arange(min(bins, MAX_COLUMN_BINS)))
    sums: Array = np.add.reduceat(values_BX, starts, axis=0)
    return sums


@dataclass(frozen=True, eq=False)
class Record:
    """Sums over tokens and responses; every array is float64 and read-only.

    Attributes:
        sequences: number of responses.
        tokens: number of response tokens.
        weight: sum of token weights (1 a token today).
        gram_DD: Phi^T W Phi.
        cross_DK: Phi^T W R.
        target_sum_K: sum of R, nats.
        target_gram_KK: R^T W R, nats^2.
        bin_sum_BK: sum of R by position bin, nats.
        bin_weight_B: weight by position bin.
        bin_feature_CD: sum of the weighted features by coarse position bin.
        prompt_ids_P: ascending int64 ids of the prompts.
        prompt_rows_P3: for each prompt: responses, their total entropy (nats), their total length (tokens).
    """

    sequences: int
    tokens: int
    weight: float
    gram_DD: Array
    cross_DK: Array
    target_sum_K: Array
    target_gram_KK: Array
    bin_sum_BK: Array
    bin_weight_B: Array
    bin_feature_CD: Array
    prompt_ids_P: IntArray
    prompt_rows_P3: Array

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                owned = value.copy() if value.flags.writeable else value
                owned.flags.writeable = False
                object.__setattr__(self, field.name, owned)

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore from a pickle, which drops the mark of read-only arrays."""
        vars(self).update(state)
        self.__post_init__()

    @property
    def shape(self) -> Shape:
        """Sizes of this record's arrays."""
        features, targets = self.cross_DK.shape
        return Shape(features, targets, len(self.bin_weight_B))

    @classmethod
    def zero(cls, shape: Shape) -> Self:
        """The record of nothing."""
        d, k, b = shape.features, shape.targets, shape.bins
        return cls(
            0, 0, 0.0, np.zeros((d, d)), np.zeros((d, k)), np.zeros(k), np.zeros((k, k)), np.zeros((b, k)), np.zeros(b),
            np.zeros((shape.column_bins, d)), np.zeros(0, np.int64), np.zeros((0, len(PROMPT_COLUMNS))),
        )  # fmt: skip

    def __add__(self, other: "Record") -> "Record":
        return self._combine(other, 1)

    def __sub__(self, other: "Record") -> "Record":
        return self._combine(other, -1)

    def _combine(self, other: "Record", sign: int) -> "Record":
        if self.shape != other.shape:
            raise RecordError(f"record: got {other.shape}; the run has {self.shape}")
        ids_P, rows_P3 = _merge_prompts(self, other, sign)
        return Record(
            self.sequences + sign * other.sequences,
            self.tokens + sign * other.tokens,
            self.weight + sign * other.weight,
            self.gram_DD + sign * other.gram_DD,
            self.cross_DK + sign * other.cross_DK,
            self.target_sum_K + sign * other.target_sum_K,
            self.target_gram_KK + sign * other.target_gram_KK,
            self.bin_sum_BK + sign * other.bin_sum_BK,
            self.bin_weight_B + sign * other.bin_weight_B,
            self.bin_feature_CD + sign * other.bin_feature_CD,
            ids_P,
            rows_P3,
        )

    def without_prompts(self) -> "Record":
        """Return the record without its table of prompts: the sums of a fit."""
        empty = Record.zero(self.shape)
        return replace(self, prompt_ids_P=empty.prompt_ids_P, prompt_rows_P3=empty.prompt_rows_P3)

    def pack(self) -> Array:
        """Return one float64 vector: a header, then every array."""
        header = [SCHEMA_VERSION, *self.cross_DK.shape, len(self.bin_weight_B), len(self.prompt_ids_P)]
        counts = [self.sequences, self.tokens, self.weight]
        arrays = (
            self.gram_DD, self.cross_DK, self.target_sum_K, self.target_gram_KK, self.bin_sum_BK, self.bin_weight_B,
            self.bin_feature_CD, self.prompt_ids_P, self.prompt_rows_P3,
        )  # fmt: skip
        return np.concatenate(
            [np.array([*header, *counts], np.float64), *(a.ravel().astype(np.float64) for a in arrays)]
        )

    @classmethod
    def unpack(cls, packed: Array) -> Self:
        """Return the record of a vector that `pack` made.

        Raises RecordError for another version or length, or a count or id that is not whole.
        """
        start = _HEADER + _COUNTS
        if packed.ndim != 1 or packed.dtype != np.float64 or len(packed) < start or packed[0] != SCHEMA_VERSION:
            raise RecordError(f"record: need a float64 vector of schema version {SCHEMA_VERSION}")
        refuse_unless_whole(packed[1 : start - 1])
        d, k, b, p = (int(size) for size in packed[1:_HEADER])
        c = Shape(d, k, b).column_bins
        shapes = [(d, d), (d, k), (k,), (k, k), (b, k), (b,), (c, d), (p,), (p, len(PROMPT_COLUMNS))]
        sizes = [math.prod(shape) for shape in shapes]
        body = packed[start:]
        if min(d, k, b, p) < 0 or len(body) != sum(sizes):
            raise RecordError(f"record: got {len(packed)} numbers, which do not fit its own header")
        ends = list(accumulate(sizes))
        parts = [body[e - size : e].reshape(s) for e, size, s in zip(ends, sizes, shapes, strict=True)]
        sequences, tokens, weight = packed[_HEADER:start]
        *sums, ids_P, rows_P3 = parts
        refuse_unless_whole(ids_P)
        gram, cross, target_sum, target_gram, bin_sum, bin_weight, bin_feature = sums
        return cls(
            int(sequences), int(tokens), float(weight), gram, cross, target_sum, target_gram, bin_sum, bin_weight,
            bin_feature, ids_P.astype(np.int64), rows_P3,
        )  # fmt: skip


def refuse_unless_whole(values: Array) -> None:
    """Refuse counts and ids that are not whole, or past float64's exact range."""
    if not ((np.abs(values) <= _LARGEST_WHOLE) & (values == np.trunc(values))).all():
        raise RecordError("record: holds a count or an id that is no whole number; it was not merged")


def _merge_prompts(left: Record, right: Record, sign: int) -> tuple[IntArray, Array]:
    """Add rows by prompt id; drop a prompt without a response, as zero has none."""
    ids, inverse = np.unique(np.concatenate([left.prompt_ids_P, right.prompt_ids_P]), return_inverse=True)
    rows = np.zeros((len(ids), len(PROMPT_COLUMNS)))
    np.add.at(rows, inverse, np.concatenate([left.prompt_rows_P3, sign * right.prompt_rows_P3]))
    present = rows[:, 0] != 0
    return ids[present], rows[present]


def total(records: Iterable[Record], shape: Shape) -> Record:
    """Return the sum of records, from zero in the order given.

    The order fixes the bits.
    """
    result = Record.zero(shape)
    for record in records:
        result = result + record
    return result


def record_of_tokens(phi_TD: Array, target_TK: Array, position_T: IntArray, cap: int) -> Record:
    """Return the record of tokens alone; `with_prompts` adds responses and prompts.

    Products are summed in the widest float of the machine and rounded once: near a singular Gram matrix beta loses as
    many digits as the condition number has. The bits do not depend on BLAS or its threads either.

    Args:
        phi_TD: features of every token of the shard.
        target_TK: targets of every token, nats.
        position_T: position of each token in its response, from 0.
        cap: max_new_tokens.
    """
    bins_T, count = bin_of(position_T, cap), position_bins(cap)
    wide_phi_TD, wide_target_TK = phi_TD.astype(np.longdouble), target_TK.astype(np.longdouble)
    shape = Shape(phi_TD.shape[1], target_TK.shape[1], count)
    return Record(
        0, len(phi_TD), float(len(phi_TD)), _rounded(wide_phi_TD.T @ wide_phi_TD),
        _rounded(wide_phi_TD.T @ wide_target_TK), _rounded(wide_target_TK.sum(axis=0)),
        _rounded(wide_target_TK.T @ wide_target_TK), _sums_by_bin(target_TK, bins_T, count),
        np.bincount(bins_T, minlength=count).astype(np.float64),
        _sums_by_bin(phi_TD, column_bin_of(bins_T, count), shape.column_bins), np.zeros(0, np.int64),
        np.zeros((0, len(PROMPT_COLUMNS))),
    )  # fmt: skip


def _sums_by_bin(values_TX: Array, bins_T: IntArray, bins: int) -> Array:
    """Return the sum of each column by bin [bins, X]."""
    sums = np.zeros((bins, values_TX.shape[1]))
    for column, values_T in enumerate(values_TX.T):
        sums[:, column] = np.bincount(bins_T, values_T, bins)
    return sums


def _rounded(wide: npt.NDArray[np.longdouble]) -> Array:
    return wide.astype(np.float64)


def with_prompts(record: Record, prompt_ids: IntArray, rows: Array) -> Record:
    """Return the record with its responses counted.

    Each id has a row (responses, entropy, tokens); an id may occur twice.
    """
    empty = Record.zero(record.shape)
    sequences = int(rows[:, 0].sum())
    values = {field.name: getattr(empty, field.name) for field in fields(empty)}
    order = np.argsort(prompt_ids, kind="stable")
    listed = Record(
        **(values | {"sequences": sequences, "prompt_ids_P": prompt_ids[order], "prompt_rows_P3": rows[order]})
    )
    return record + listed


def packed_size(shape: Shape, prompts: int) -> int:
    """Return the numbers in a packed record with this number of prompts."""
    d, k, b = shape.features, shape.targets, shape.bins
    sums = d * d + d * k + k + k * k + b * k + b + shape.column_bins * d
    return _HEADER + _COUNTS + sums + prompts * (1 + len(PROMPT_COLUMNS))
