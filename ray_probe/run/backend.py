"""What works a run off: rounds one after the other, then the commit of the gradient summed over them.

A backend collects, fits and differentiates; `ray_probe.controller.local_backend.LocalBackend` does it in this process,
`ray_probe.cluster.backend.RayBackend` on a Ray cluster. Both use the same plain `Rollout`, `Fitter` and
`GradientStore`. The gradient itself, as large as the model, never passes through here.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import Collected, ShardSums
from ray_probe.run.plan import Shard
from ray_probe.run.prepared import PreparedRun
from ray_probe.run.progress_tracker import ProgressTracker

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


class Backend(Protocol):
    """Where shards are worked on."""

    @property
    def actors(self) -> int:
        """Rollout actors asked for."""
        ...

    @property
    def layout(self) -> ParameterLayout:
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

    def run_round(self, shards: Sequence[Shard], tracker: ProgressTracker, stop: StopCheck) -> RoundOutcome:
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


class LoadingBackend(Backend, Protocol):
    """A backend that loads checkpoints, one after the other."""

    @property
    def info(self) -> Mapping[str, Any]:
        """What a started actor said of itself: layout, EOS ids, device, threads."""
        ...

    def load(self, prepared: PreparedRun, stop: StopCheck) -> None:
        """Have the actors load the checkpoint; returns when one is ready, or `stop` says so."""
        ...

    def open(self, directory: RunDirectory, finished: Sequence[Sequence[int]], held_positions: int = 0) -> None:
        """Start on a run directory: the fitter on its ledger, the writer on its gradients.

        Args:
            directory: of the run.
            finished: shards of each round that a resumed run keeps.
            held_positions: whose graphs an actor may hold (see `Pass`).
        """
        ...
