"""Tokens that hold the nuclei of some rows, as the search yields them.

Shape suffixes: N some rows, K candidates of a row.
"""

from dataclasses import dataclass, field

from torch import Tensor

from ray_probe.core.policy.logits import Buffer


@dataclass(frozen=True)
class NucleusScratch:
    """Memory for the tables of the search, reused by every chunk."""

    maxima: Buffer = field(default_factory=Buffer)
    weight: Buffer = field(default_factory=Buffer)
    scaled: Buffer = field(default_factory=Buffer)
    level: Buffer = field(default_factory=Buffer)
    mass: Buffer = field(default_factory=Buffer)
    place: Buffer = field(default_factory=Buffer)
    bin: Buffer = field(default_factory=Buffer)


@dataclass(frozen=True)
class Candidates:
    """Some rows of a chunk with tokens that hold their nuclei.

    The tensors are valid until the next group is requested.

    Attributes:
        rows_N: int64, rows of the chunk.
        columns_NK: int64, the candidates' tokens; None: the whole vocabulary in its order.
        largest_N: largest raw logit of the row.
        scaled_NK: float64, scaled logits, nats; the largest is 0, the smallest at least -80.
        mass_NK: float64, exp(scaled) in the nucleus S, 0 outside.
        rest_N: float64, summed exp(scaled) of all tokens outside S.
        kept_N: int64, tokens in S.
        threshold_N: smallest scaled logit of S: S is `scaled >= threshold`, also among all tokens.
        second_N: second largest scaled logit of the row, -inf in a vocabulary of one token.
    """

    rows_N: Tensor
    columns_NK: Tensor | None
    largest_N: Tensor
    scaled_NK: Tensor
    mass_NK: Tensor
    rest_N: Tensor
    kept_N: Tensor
    threshold_N: Tensor
    second_N: Tensor
