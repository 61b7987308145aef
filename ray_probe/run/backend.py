"""What works a run off: rounds one after the other, then the commit of the gradient summed over them.

A backend collects, fits and differentiates; `ray_probe.controller.local_backend.InProcess` does it in this process,
`ray_probe.cluster.backend.RayBackend` on a Ray cluster. Both use the same plain `Rollout`, `Fitter` and
`GradientStore`. The gradient itself, as large as the model, never passes through here.
"""

import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ray_probe.core.estimator.baselines import PublishedFit
from ray_probe.errors import GradientError, ShardError
from ray_probe.gradient.layout import Layout
from ray_probe.run.messages import Collected, GradientReport, ShardKey, ShardSums, shard_label
from ray_probe.run.plan import Shard
from ray_probe.run.progress_tracker import Tracker

MAX_NAMES = 3

StopCheck = Callable[[], bool]


def new_group() -> str:
    """A name for the rounds up to the next commit; no other run ever has it, so that no sum is taken for another."""
    return secrets.token_hex(8)


class Stopped(Exception):
    """The run was asked to stop: no fault of anybody; what was committed is kept."""


def refuse_if_stopped(stop: StopCheck) -> None:
    """Raise Stopped once the run is asked to end."""
    if stop():
        raise Stopped("the run was asked to stop")


@dataclass
class RoundOutcome:
    """What a backend makes of a round. It is final once the round is committed: a lost shard is done again until then.

    Attributes:
        round: round in the plan.
        collected: first halves, one a shard.
        sums: second halves; only these shards count.
        records: shards whose record the fit holds: those in `sums`, and any given up after its record was in.
        beta: the fitter's global fit after the round.
        given_up: ids of shards that failed too often.
        conflicts: ids of shards that came again with other bytes, made on the same kind of CPU.
        regenerated: how many did so where it is no error: on CUDA, or on another kind of CPU.
        retried: shards that were done again.
        by_actor: actor -> the shards whose gradient is from it.
        fit_s: seconds from the last record to the fit.
    """

    round: int
    collected: list[Collected] = field(default_factory=list)
    sums: list[ShardSums] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    beta: dict[str, Any] = field(default_factory=dict)
    given_up: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    regenerated: int = 0
    retried: int = 0
    by_actor: dict[int, tuple[int, ...]] = field(default_factory=dict)
    fit_s: float = 0.0


def told_with(number: int, first: int, came_again: Collection[ShardKey], told: Collection[ShardKey]) -> list[ShardKey]:
    """Of the shards that came again with other bytes, those that are told with a round: its own, ascending.

    With the first round that is not committed come those of rounds before that nobody was told of: a process that was
    thought dead may deliver at any time.

    Args:
        number: the round.
        first: the first round that is not committed.
        came_again: such shards so far.
        told: those that were told with the rounds before `first`.
    """
    late = {key for key in came_again if key[0] < first and number == first} - set(told)
    return sorted(late | {key for key in came_again if key[0] == number})


def ids_of(keys: Collection[ShardKey]) -> list[str]:
    """Shards as results name them."""
    return [f"{number}/{shard}" for number, shard in keys]


def refuse_without_sums(outcome: RoundOutcome) -> None:
    """A round that nothing is left of can give no estimate. Raises ShardError."""
    if not outcome.sums:
        raise ShardError(f"round {outcome.round + 1}: every shard was given up; see log.txt for the causes")


class Backend(Protocol):
    """Where shards are worked on."""

    @property
    def actors(self) -> int:
        """Rollout actors asked for."""
        ...

    @property
    def layout(self) -> Layout:
        """Names and shapes of the trainable parameters."""
        ...

    @property
    def gradient_norm_sq(self) -> float:
        """Squared norm of the gradient summed over all rounds committed so far, float64."""
        ...

    @property
    def gradient_sha256(self) -> str | None:
        """Digest of the file that holds that gradient, hexadecimal; None before a commit."""
        ...

    def beta(self) -> dict[str, Any]:
        """The fitter's current global fit."""
        ...

    def run_round(self, shards: Sequence[Shard], tracker: Tracker, stop: StopCheck) -> RoundOutcome:
        """Work one round off; its gradients stay where they are until `commit`. Raises Stopped within a second."""
        ...

    def commit(self) -> list[RoundOutcome]:
        """Sum the gradients of the rounds since the last commit and put them on disk, beside the old state."""
        ...

    def settle(self) -> None:
        """The committed rounds count now: the state before them can go."""
        ...

    def save_gradient(self, path: Path, rounds: int, sequences: int) -> None:
        """Write the gradient summed over so many rounds, divided by the responses, by parameter name."""
        ...


def check_reached(layout: Layout, reports: Collection[GradientReport]) -> None:
    """Refuse parameters that no shard of any actor gave a gradient to; an expert that some shard reached is fine.

    Raises:
        GradientError: some parameter takes no part in the loss.
    """
    unreached = set.intersection(*(set(report.unreached) for report in reports)) if reports else set()
    if unreached:
        names = [layout.names[place] for place in sorted(unreached)]
        shown = ", ".join(name[-80:] for name in names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
        raise GradientError(
            f"gradient: {len(names)} of {len(layout.names)} trainable parameters got none in any shard ({shown}); "
            "choose others with model.trainable"
        )


def check_baseline(report: ShardSums, fit: PublishedFit) -> None:
    """Refuse a shard whose gradient was formed under another baseline than the plan's.

    Args:
        report: what the shard says of its baseline.
        fit: the fit that gradients of its round use.

    Raises:
        ShardError: the version differs, or its own record was left in (or out) where it should not be.
    """
    leave_out = fit.rule.fit == "leave_one_out" and fit.round >= report.round
    if (report.version, report.own_left_out) != (fit.version, leave_out):
        got, asked = (
            f"version {version} with its own record {'out' if out else 'in'}"
            for version, out in ((report.version, report.own_left_out), (fit.version, leave_out))
        )
        label = shard_label(report.round, report.shard)
        raise ShardError(f"{label}: its baseline is {got}; the plan asks for {asked}")
