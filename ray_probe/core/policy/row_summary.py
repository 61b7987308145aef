"""The sampling policy of a row of logits in nine numbers.

Shape suffixes: T rows (one a token), N some rows.
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSummary:
    """The policy at T prefixes; float64 unless stated.

    Attributes:
        largest_T: largest raw logit, in the logits' dtype (widened).
        threshold_T: smallest scaled logit of S, in the same dtype: S is `scaled >= threshold`; -inf for `top_p = 1`.
        kept_T: int64, tokens in S; the whole vocabulary for `top_p = 1`.
        log_norm_T: logsumexp of the scaled logits over S, nats.
        entropy_T: entropy of q, nats; never below 0.
        top1_T: largest probability in q.
        margin_T: difference of the two largest kept scaled logits, nats; 0 where one token is kept.
        tail_mass_T: mass of the full softmax outside S, summed directly, because 1 - head mass would cancel.
        logit_var_T: variance of the scaled logits under q, nats^2.
    """

    largest_T: Tensor
    threshold_T: Tensor
    kept_T: Tensor
    log_norm_T: Tensor
    entropy_T: Tensor
    top1_T: Tensor
    margin_T: Tensor
    tail_mass_T: Tensor
    logit_var_T: Tensor

    @classmethod
    def empty(cls, rows: int, dtype: torch.dtype, device: torch.device) -> "RowSummary":
        """Allocate an uninitialised summary for `rows` rows of logits of this dtype."""
        dtypes = {"largest_T": dtype, "threshold_T": dtype, "kept_T": torch.int64}
        names = [field.name for field in fields(cls)]
        return cls(*(torch.empty(rows, dtype=dtypes.get(name, torch.float64), device=device) for name in names))

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """All attributes, in order."""
        return tuple(vars(self).values())

    def __getitem__(self, rows: slice) -> "RowSummary":
        return RowSummary(*(column[rows] for column in self.columns))

    def __setitem__(self, rows: slice | Tensor, part: "RowSummary") -> None:
        for column_T, part_N in zip(self.columns, part.columns, strict=True):
            column_T[rows] = part_N
