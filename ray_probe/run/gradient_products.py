"""Products of the gradients of different commits: what tells noise from signal.

A fit without a shard's own record may still hold the records of shards of the same commit, so their gradients depend on
each other. A fit of an earlier commit holds none of a later one. So the product of the gradients of two commits that
share no prompt has the expectation `N_c N_d |grad J|^2` exactly (docs/estimator.md, "Noise").

Commits in a row that share no prompt form a window. A commit that repeats a prompt of its window starts the next one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ray_probe.run.preparation.plan import Plan
from ray_probe.run.rounds_file import FinishedRound


@dataclass(frozen=True)
class GradientProducts:
    """The committed gradient's squared norm and the products of its commits.

    Attributes:
        norm_sq: squared norm of the sum over all responses.
        cross: sum of the products of all pairs of commits of one window.
        pairs: sum of the products of their numbers of responses; 0: no two commits share no prompt.
    """

    norm_sq: float = 0.0
    cross: float = 0.0
    pairs: float = 0.0

    @classmethod
    def of(cls, rounds: Sequence[FinishedRound]) -> "GradientProducts":
        """Return the products that finished rounds have on record.

        A run of another version has none; its `norm_sq` is 0 then.
        """
        cross = pairs = 0.0
        before = [0]
        for entry in rounds:
            before.append(before[-1] + entry.sequences)
        for entry in rounds:
            if entry.gradient_cross is not None and entry.gradient_window is not None:
                first, last = entry.group
                cross += entry.gradient_cross
                pairs += (before[first] - before[entry.gradient_window]) * (before[last + 1] - before[first])
        norm_sq = rounds[-1].gradient_norm_sq if rounds else None
        return cls(norm_sq or 0.0, cross, float(pairs))


def window_of(plan: Plan, window: int, first: int, stop: int) -> int:
    """Return the rounds before the window of a commit.

    Args:
        plan: of the run.
        window: rounds before the window of the commit before.
        first: first round of the commit.
        stop: round after its last.
    """
    return first if plan.prompts(window, first) & plan.prompts(first, stop) else window
