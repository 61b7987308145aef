"""The gradient of log q(Y) and H by the logits, in closed form.

The nucleus S is held fixed (docs/specification.md, "Sampling policy").

With a = logits / temperature: `d log q(Y) / d a_i = 1[i = Y] - q_i` and `d H / d a_i = -q_i (log q_i + H)` for i in S,
0 outside. So the gradient by a logit with scaled value s_i is `own * 1[i = Y] + exp(s_i) (rise * s_i + level)`, with
three numbers a row.

Shape suffixes: T tokens, W columns of a tile of the vocabulary, M kept tokens of all rows.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ray_probe.core.policy.logits import LEAST, LOG2_E, Buffer, SamplingRule, exponentials, powers_of_two
from ray_probe.core.policy.row_summary import RowSummary


@dataclass(frozen=True)
class TileScratch:
    """Memory for the tables of `LogitGradient.tile`, reused by every tile."""

    gradient: Buffer = field(default_factory=Buffer)
    mass: Buffer = field(default_factory=Buffer)


@dataclass(frozen=True)
class LogitGradient:
    """The gradient by the rows of logits of T tokens; float64 unless stated.

    Attributes:
        rule: temperature and top_p.
        largest_T: largest raw logit of the row, in the logits' dtype (widened).
        threshold_T: smallest scaled logit of S, in the same dtype.
        tokens_T: int64, Y.
        token_scaled_T: scaled logit of Y, nats.
        outside_T: bool, Y is not in S.
        rise_T: `rise` in the formula of this module.
        level_T: `level` there.
        own_T: `own` there.
    """

    rule: SamplingRule
    largest_T: Tensor
    threshold_T: Tensor
    tokens_T: Tensor
    token_scaled_T: Tensor
    outside_T: Tensor
    rise_T: Tensor
    level_T: Tensor
    own_T: Tensor

    @classmethod
    def of(
        cls, rule: SamplingRule, summary: RowSummary, tokens_T: Tensor, token_scaled_T: Tensor, outside_T: Tensor,
        grad_log_q_T: Tensor, grad_entropy_T: Tensor,
    ) -> "LogitGradient":  # fmt: skip
        """Return the gradient by the logits from the gradients by log q(Y) and H.

        Args:
            rule: temperature and top_p.
            summary: of the rows.
            tokens_T: Y.
            token_scaled_T: scaled logit of Y, nats.
            outside_T: Y is not in S.
            grad_log_q_T: gradient by log q(Y).
            grad_entropy_T: gradient by H.
        """
        grad_log_q_T, grad_entropy_T = grad_log_q_T.double(), grad_entropy_T.double()
        log_norm_T = summary.log_norm_T
        # For Y outside S, log q is taken in S + {Y}, where every q is smaller than in S alone.
        with_token_T = token_log_norm(log_norm_T, token_scaled_T, outside_T)
        share_T = torch.where(outside_T, -torch.expm1(token_scaled_T - with_token_T), 1.0)
        score_T = grad_log_q_T * torch.exp(log_norm_T - with_token_T)
        per_logit = 1.0 / rule.temperature
        scale_T = torch.exp(-log_norm_T) * per_logit
        return cls(
            rule, summary.largest_T, summary.threshold_T, tokens_T, token_scaled_T, outside_T,
            -grad_entropy_T * scale_T,
            -(grad_entropy_T * (summary.entropy_T - log_norm_T) + score_T) * scale_T,
            grad_log_q_T * share_T * per_logit,
        )  # fmt: skip

    def __getitem__(self, rows: slice | Tensor) -> "LogitGradient":
        rule, *columns = vars(self).values()
        return LogitGradient(rule, *(column[rows] for column in columns))

    def kept(self, row_M: Tensor, column_M: Tensor, scaled_M: Tensor) -> Tensor:
        """Return the gradient by the logits of kept tokens [M], float64."""
        scaled_M = scaled_M.double()
        own_M = torch.where(column_M == self.tokens_T[row_M], self.own_T[row_M], 0.0)
        return exponentials(scaled_M) * (self.rise_T[row_M] * scaled_M + self.level_T[row_M]) + own_M

    def tile(self, logits_TW: Tensor, first: int, scratch: TileScratch, keep_TW: Tensor | None = None) -> Tensor:
        """Return the gradient by a tile [T, W], valid until the scratch is reused.

        Args:
            logits_TW: raw logits, float32 or wider.
            first: column of the vocabulary at which the tile starts.
            scratch: memory for tables.
            keep_TW: bool, the nucleus; None: the logits that reach its threshold.
        """
        dtype, width = logits_TW.dtype, logits_TW.shape[-1]
        grad_TW, mass_TW = scratch.gradient.like(logits_TW), scratch.mass.like(logits_TW)
        torch.sub(logits_TW, self.largest_T.unsqueeze(-1), out=grad_TW).div_(self.rule.temperature)
        powers_of_two(torch.mul(grad_TW, LOG2_E, out=mass_TW), mass_TW)
        if self.rule.top_p < 1.0:
            mass_TW.mul_(grad_TW >= self.threshold_T.unsqueeze(-1) if keep_TW is None else keep_TW)
        grad_TW.clamp_(min=LEAST).mul_(self.rise_T.to(dtype).unsqueeze(-1)).add_(self.level_T.to(dtype).unsqueeze(-1))
        grad_TW.mul_(mass_TW)
        column_T = self.tokens_T - first
        own_T = torch.where((column_T >= 0) & (column_T < width), self.own_T, 0.0).to(dtype)
        return grad_TW.scatter_add_(-1, column_T.clamp(0, width - 1).unsqueeze(-1), own_T.unsqueeze(-1))


def token_log_norm(log_norm_T: Tensor, token_scaled_T: Tensor, outside_T: Tensor) -> Tensor:
    """Return the log normaliser of S + {Y} [T], nats, which is S where Y is in S."""
    return torch.where(outside_T, torch.logaddexp(log_norm_T, token_scaled_T), log_norm_T)
