"""Sums of changes over comparisons that follow one another, with errors.

The comparisons use the same prompts, and a checkpoint in the middle gives the same responses to both of its neighbours.
So the error of a sum over them comes from the sums of each prompt.

Shape suffixes: F columns of a prompt's row, P prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.run.comparison.change import Figure
from ray_probe.run.comparison.estimates import PromptRows

Rounds = Sequence[PromptRows]
"""The rows of a comparison's prompts, round by round."""


@dataclass(frozen=True)
class PathSums:
    """The change of each prompt since the first checkpoint of a path.

    Attributes:
        steps: rows of each comparison on the path, by round.
        rounds: rounds of each that count.
        first: rows of the first comparison.
        since_P: sums of the total change over the path, weighted as the responses of the first comparison [P].
    """

    steps: tuple[Rounds, ...]
    rounds: int
    first: PromptRows
    since_P: Array

    @classmethod
    def over(cls, steps: Sequence[Rounds]) -> Self | None:
        """Return the sums over comparisons, of the rounds and prompts of all.

        None where they share no round or no prompt.
        """
        rounds = min(map(len, steps))
        if not rounds:
            return None
        sums = [summed(step[:rounds]) for step in steps]
        prompts = sorted(set.intersection(*(set(one.ids) for one in sums)))
        if not prompts:
            return None
        first, *others = [one.only(prompts) for one in sums]
        since_P = _weighted(first, first)
        for rows in others:
            since_P = since_P + _weighted(first, rows)
        return cls(tuple(steps), rounds, first, since_P)

    def then(self, step: Rounds) -> Self | None:
        """Return the sums over one comparison more; None as for `over`."""
        if len(step) >= self.rounds:
            rows = summed(step[: self.rounds])
            if set(self.first.ids) <= set(rows.ids):
                since_P = self.since_P + _weighted(self.first, rows.only(self.first.ids))
                return type(self)((*self.steps, step), self.rounds, self.first, since_P)
        return self.over((*self.steps, step))

    @property
    def since(self) -> Figure:
        """The change of the entropy of a response since the first checkpoint, nats."""
        return self.first.mean(self.since_P)


def summed(rounds: Rounds) -> PromptRows:
    """Return the rows of several rounds added by prompt, in the order of the rounds."""
    if len(rounds) == 1:
        return rounds[0]
    ids, place_N = np.unique(np.concatenate([one.ids for one in rounds]), return_inverse=True)
    table_PF = np.zeros((len(ids), len(rounds[0].table_FP)))
    np.add.at(table_PF, place_N, np.concatenate([one.table_FP.T for one in rounds]))
    return PromptRows(ids.tolist(), table_PF.T)


def _weighted(first: PromptRows, rows: PromptRows) -> Array:
    """Return the total change of each prompt, as for the first comparison's responses."""
    weighted_P: Array = rows.total_P * (first.responses_P / rows.responses_P)
    return weighted_P
