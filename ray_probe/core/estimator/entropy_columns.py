"""Columns made from the entropies of a prompt's responses. numpy only.

A response never enters its own sibling columns: the sums are over the others alone, never a total less its own. In a
comparison of two policies its pair does not either: both responses of a pair then see the same siblings.

Shape suffixes: G responses of one use of a prompt, T tokens of one response, L tokens of the longest, D columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.targets import future_sum


@dataclass(frozen=True, eq=False)
class PromptUse:
    """The responses of one use of a prompt, as tables with zeros past their ends.

    Attributes:
        entropy_GL: H of each token, nats.
        future_GL: sum of H after each token, nats.
        present_GL: 1 at a token, 0 past the end.
        policies: 1, or 2: the first and the second half of the responses are of one policy each, paired in order.
    """

    entropy_GL: Array
    future_GL: Array
    present_GL: Array
    policies: int = 1

    @classmethod
    def of(cls, entropies: Sequence[Array], policies: int = 1) -> "PromptUse":
        """Return the tables of G responses, each [T]."""
        tables = np.zeros((3, len(entropies), max(len(entropy_T) for entropy_T in entropies)))
        for row, entropy_T in enumerate(entropies):
            tables[:, row, : len(entropy_T)] = entropy_T, future_sum(entropy_T), np.ones(len(entropy_T))
        entropy_GL, future_GL, present_GL = tables
        return cls(entropy_GL, future_GL, present_GL, policies)

    @property
    def siblings(self) -> int:
        """Siblings of each response."""
        return len(self.entropy_GL) - self.policies

    def over_siblings(self, values_GX: Array) -> Array:
        """Return the sum over the siblings of each response [G, ...]."""
        pair_GX = values_GX.reshape(self.policies, -1, *values_GX.shape[1:]).sum(axis=0)
        before_GX, after_GX = np.zeros_like(pair_GX), np.zeros_like(pair_GX)
        before_GX[1:] = np.cumsum(pair_GX[:-1], axis=0)
        after_GX[:-1] = np.cumsum(pair_GX[:0:-1], axis=0)[::-1]
        return np.concatenate([before_GX + after_GX] * self.policies)


def _sibling_mu(use: PromptUse) -> Array:
    reach_GL, future_GL = use.over_siblings(use.present_GL), use.over_siblings(use.future_GL)
    mean_GL: Array = np.divide(future_GL, reach_GL, out=np.zeros_like(reach_GL), where=reach_GL > 0)
    return mean_GL


def _sibling_total(use: PromptUse) -> Array:
    mean_G1 = use.over_siblings(use.entropy_GL.sum(axis=1))[:, None] / max(use.siblings, 1)
    return np.broadcast_to(mean_G1, use.entropy_GL.shape)


def _entropy_so_far(use: PromptUse) -> Array:
    so_far_GL = np.zeros_like(use.entropy_GL)
    so_far_GL[:, 1:] = np.cumsum(use.entropy_GL[:, :-1], axis=1)
    return so_far_GL


FUNCTIONS: dict[str, Callable[[PromptUse], Array]] = {
    "sibling_mu": _sibling_mu,
    "sibling_total": _sibling_total,
    "entropy_so_far": _entropy_so_far,
}
"""The function of each column of `ray_probe.core.columns` that is made from entropies."""


def entropy_columns(names: Sequence[str], entropies: Sequence[Array], policies: int = 1) -> list[Array]:
    """Return the named columns of each response [T, D], nats, float64.

    Args:
        names: keys of `FUNCTIONS`.
        entropies: H of all responses of one use of a prompt, each [T], nats; of two policies their mean.
        policies: see `PromptUse`.
    """
    use = PromptUse.of(entropies, policies)
    table_GLD = np.empty((*use.entropy_GL.shape, len(names)))
    for column, name in enumerate(names):
        table_GLD[..., column] = FUNCTIONS[name](use)
    return [table_GLD[row, : len(entropy_T)].copy() for row, entropy_T in enumerate(entropies)]
