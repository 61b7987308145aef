"""The gradient of log q(Y) and H in closed form, with the nucleus S held fixed (spec section 2).

With a = logits / temperature: `d log q(Y) / d a_i = 1[i = Y] - q_i` and `d H / d a_i = -q_i (log q_i + H)` for i in S,
0 outside. So the gradient by a logit is `own * 1[i = Y] + exp(s_i) (rise * s_i + level)` of its scaled value s_i, with
three numbers a row.

Shape suffixes: T tokens, W columns of a tile of the vocabulary, M kept tokens of all rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ray_probe.core.scaling import LEAST, LOG2_E, SamplingRule, Workspace, exponentials, powers_of_two
from ray_probe.core.summaries import RowSummary


@dataclass(frozen=True)
class Slopes:
    """What the gradient of T tokens takes, float64 unless said.

    Attributes:
        rule: temperature and top_p.
        largest_T: largest raw logit of the row, in the logits' dtype (widened).
        threshold_T: smallest scaled logit of S, in the same dtype.
        tokens_T: int64, Y.
        token_scaled_T: scaled logit of Y, nats.
        outside_T: bool, Y is not in S.
        rise_T: see above.
        level_T: see above.
        own_T: see above.
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
    ) -> "Slopes":  # fmt: skip
        """From a row's summary, its token's scaled logit, and the gradients of the two outputs.

        log q of a token outside S is taken in S + {Y}: q there is smaller than in S alone.
        """
        grad_log_q_T, grad_entropy_T = grad_log_q_T.double(), grad_entropy_T.double()
        log_norm_T = summary.log_norm_T
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

    def __getitem__(self, chunk: slice | Tensor) -> "Slopes":
        columns = (getattr(self, name)[chunk] for name in self.__dataclass_fields__ if name != "rule")
        return Slopes(self.rule, *columns)

    def of_kept(self, row_M: Tensor, column_M: Tensor, scaled_M: Tensor) -> Tensor:
        """Gradient by the logits of kept tokens [M], float64: all of it but where Y is not kept."""
        scaled_M = scaled_M.double()
        own_M = torch.where(column_M == self.tokens_T[row_M], self.own_T[row_M], 0.0)
        return exponentials(scaled_M) * (self.rise_T[row_M] * scaled_M + self.level_T[row_M]) + own_M

    def of_outside(self) -> tuple[Tensor, Tensor]:
        """Rows whose Y is not kept [N], and the gradient by its logit, float64."""
        rows_N = self.outside_T.nonzero().squeeze(-1)
        return rows_N, self.own_T[rows_N]

    def tile(self, logits_TW: Tensor, first: int, space: Workspace, keep_TW: Tensor | None = None) -> Tensor:
        """Gradient by a tile of raw logits [T, W]; to be used before the next tile is asked for.

        Args:
            logits_TW: raw logits, float32 or wider.
            first: the vocabulary's column that is the tile's first.
            space: memory for tables.
            keep_TW: the nucleus, where it is not to be told from the logits by its threshold.
        """
        shape, dtype, device = logits_TW.shape, logits_TW.dtype, logits_TW.device
        slope_TW, mass_TW = (space.table(name, shape, dtype, device) for name in ("slope", "powers"))
        torch.sub(logits_TW, self.largest_T.unsqueeze(-1), out=slope_TW).div_(self.rule.temperature)
        powers_of_two(torch.mul(slope_TW, LOG2_E, out=mass_TW), mass_TW)
        if self.rule.top_p < 1.0:
            mass_TW.mul_(slope_TW >= self.threshold_T.unsqueeze(-1) if keep_TW is None else keep_TW)
        slope_TW.clamp_(min=LEAST).mul_(self.rise_T.to(dtype).unsqueeze(-1)).add_(self.level_T.to(dtype).unsqueeze(-1))
        slope_TW.mul_(mass_TW)
        column_T = self.tokens_T - first
        own_T = torch.where((column_T >= 0) & (column_T < shape[-1]), self.own_T, 0.0).to(dtype)
        column_T1 = column_T.clamp(0, shape[-1] - 1).unsqueeze(-1)
        return slope_TW.scatter_add_(-1, column_T1, own_T.unsqueeze(-1))


def token_log_norm(log_norm_T: Tensor, token_scaled_T: Tensor, outside_T: Tensor) -> Tensor:
    """Log normaliser of S + {Y} [T], nats: that of S wherever Y is in S already."""
    return torch.where(outside_T, torch.logaddexp(log_norm_T, token_scaled_T), log_norm_T)
