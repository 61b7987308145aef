"""A rung of the search, which decides nuclei from the largest tokens of rows.

Shape suffixes: R rows of the chunk, V vocabulary, N some rows, K candidates of a row.
"""

import torch
from torch import Tensor

from ray_probe.core.policy.logits import LEAST, SamplingRule, exponentials, scaled
from ray_probe.core.policy.nucleus.candidates import Candidates

_DOUBT = {torch.float32: 1e-5, torch.float64: 1e-12}  # relative error of a sum of `quick_exponentials`


class Rung:
    """The largest tokens of some rows, and the rows whose nucleus they decide.

    Args:
        rows_N: rows of the chunk.
        columns_NK: their largest tokens, in falling order.
        values_NK: raw logits of these tokens.
        largest_N1: largest raw logit of each row.
        weight_RV: exponentials of the chunk's logits; None: `columns_NK` is the whole vocabulary.
        rule: temperature and top_p.
    """

    # The boundary is certain where rounding of the other tokens' weight cannot move it and a candidate lies strictly
    # below it, so that no tie is left outside. It is also certain where there are no other tokens.

    def __init__(
        self, rows_N: Tensor, columns_NK: Tensor, values_NK: Tensor, largest_N1: Tensor, weight_RV: Tensor | None,
        rule: SamplingRule,
    ) -> None:  # fmt: skip
        self.rows_N, self.columns_NK, self.top_p = rows_N, columns_NK, rule.top_p
        self.scaled_NK = scaled(values_NK, largest_N1, rule.temperature)
        self.mass_NK = exponentials(self.scaled_NK)
        self.others_N = torch.zeros_like(self.mass_NK[:, 0]) if weight_RV is None else self._weighed(weight_RV)
        above_NK = self.mass_NK.cumsum(dim=-1).sub_(self.mass_NK)
        above_NK[:, 0] = 0.0
        self.held_N = self.mass_NK.sum(dim=-1)
        doubt_N = self.others_N * _DOUBT[values_NK.dtype]
        total_N = self.held_N + self.others_N
        most_N = (above_NK <= (self.top_p * (total_N + doubt_N)).unsqueeze(-1)).sum(dim=-1)
        least_N = (above_NK <= (self.top_p * (total_N - doubt_N)).unsqueeze(-1)).sum(dim=-1)
        self.threshold_N = self.scaled_NK.gather(-1, (most_N - 1).clamp_(min=0).unsqueeze(-1)).squeeze(-1)
        self.closed_N = (most_N == least_N) & (self.scaled_NK[:, -1] < self.threshold_N)
        if weight_RV is None:
            self.closed_N.fill_(True)

    def _weighed(self, weight_RV: Tensor) -> Tensor:
        """Return the other tokens' summed weight [N]; zeroes the candidates' weights."""
        if len(self.rows_N) == len(weight_RV):
            weight_RV.scatter_(-1, self.columns_NK, 0.0)
            return weight_RV.sum(dim=-1).double()
        weight_RV[self.rows_N.unsqueeze(-1), self.columns_NK] = 0.0
        return torch.stack([weight_RV[row].sum() for row in self.rows_N]).double()

    @property
    def second_N(self) -> Tensor:
        """Second largest scaled logit; -inf in a vocabulary of one token."""
        if self.scaled_NK.shape[-1] == 1:
            return torch.full_like(self.threshold_N, -torch.inf)
        return self.scaled_NK[:, 1]

    def closed(self, largest_R1: Tensor, second_R: Tensor) -> Candidates:
        """Return the rows whose nucleus is certain."""
        pick = self.closed_N.nonzero().squeeze(-1)
        rows_N, scaled_NK, threshold_N = self.rows_N[pick], self.scaled_NK[pick], self.threshold_N[pick]
        mass_NK, keep_NK = self.mass_NK[pick], scaled_NK >= threshold_N.unsqueeze(-1)
        outside_N = (mass_NK * ~keep_NK).sum(dim=-1) + self.others_N[pick]
        return Candidates(
            rows_N, self.columns_NK[pick], largest_R1[rows_N, 0], scaled_NK.clamp(min=LEAST).double(),
            mass_NK * keep_NK, outside_N, keep_NK.sum(dim=-1), threshold_N, second_R[rows_N],
        )  # fmt: skip

    def within_reach(self, size: int | None) -> Tensor:
        """Mark the open rows that `size` candidates could close [N]; None: no next rung."""
        if size is None:
            return torch.zeros_like(self.closed_N)
        # Each further candidate weighs no more than the last one.
        most_N = self.held_N + (size - self.mass_NK.shape[-1]) * self.mass_NK[:, -1]
        return ~self.closed_N & (most_N > self.top_p * (self.held_N + self.others_N))
