"""The backend interface: runs rounds, then commits their summed gradient.

`ray_probe.controller.local_backend.LocalBackend` works in this process, `ray_probe.cluster.backend.RayBackend` on a Ray
cluster. Both use the same `Rollout`, `Fitter` and `GradientStore`, which keep the gradient, as large as the model.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ray_probe.errors import ShardError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import ActorFacts, Collected, ShardSums
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.preparation.prepared import PreparedRun
from ray_probe.run.progress_tracker import ProgressTracker
from ray_probe.run.result import Beta

StopCheck = Callable[[], bool]


def new_group() -> str:
    """Return a name for the next commit group that no other run has."""
    return secrets.token_hex(8)


class Stopped(Exception):
    """The caller stopped the run; committed rounds are kept."""


def refuse_if_stopped(stop: StopCheck) -> None:
    """Raise Stopped once the caller has stopped the run."""
    if stop():
        raise Stopped("the run was asked to stop")


@dataclass
class RoundOutcome:
    """The outcome of a round; final once the round is committed.

    Attributes:
        round: round in the plan.
        collected: first halves, one a shard.
        sums: second halves; only these shards count.
        records: shards whose record the fit holds: those in `sums`, and any given up after its record was in.
        beta: the fitter's global fit after the round.
        given_up: ids of shards that failed too often.
        conflicts: ids of shards whose second record had other bytes, made on the same kind of CPU.
        regenerated: number of such shards where it is no error: on CUDA, or on another kind of CPU.
        retried: number of retries of shards.
        by_actor: actor -> the shards whose gradient it computed.
        fit_s: seconds from the last record to the fit.
    """

    round: int
    collected: list[Collected] = field(default_factory=list)
    sums: list[ShardSums] = field(default_factory=list)
    records: list[int] = field(default_factory=list)
    beta: Beta = field(default_factory=Beta)
    given_up: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    regenerated: int = 0
    retried: int = 0
    by_actor: dict[int, tuple[int, ...]] = field(default_factory=dict)
    fit_s: float = 0.0

    def refuse_without_sums(self) -> None:
        """Raise ShardError where every shard was given up: such a round gives no estimate."""
        if not self.sums:
            raise ShardError(f"round {self.round + 1}: every shard was given up; see log.txt for the causes")


@dataclass(frozen=True)
class Commit:
    """Rounds that count from now on, and the gradient of all committed rounds.

    Attributes:
        outcomes: of the rounds, final.
        norm_sq: squared norm of the gradient, float64.
        cross: product of this commit's gradient with the earlier commits of its window.
        sha256: digest of the gradient's file, hexadecimal; None where there is no file.
    """

    outcomes: list[RoundOutcome]
    norm_sq: float
    cross: float
    sha256: str | None


class Backend(Protocol):
    """Computes rounds of shards."""

    @property
    def actors(self) -> int:
        """Rollout actors requested."""

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the trainable parameters."""

    def beta(self) -> Beta:
        """Return the fitter's current global fit."""

    def run_round(self, shards: Sequence[Shard], tracker: ProgressTracker, stop: StopCheck) -> RoundOutcome:
        """Compute a round; its gradients stay on the actors until `commit`.

        Raises Stopped within a second of the stop.
        """

    def commit(self, window: int) -> Commit:
        """Write the summed gradient of the open rounds, beside the old state.

        Args:
            window: rounds before the window of this commit (see `ray_probe.run.gradient_products`).
        """

    def settle(self) -> None:
        """Delete the state before the last commit, whose rounds count now."""

    def save_gradient(self, path: Path, rounds: int, sequences: int) -> None:
        """Write the gradient over `rounds`, divided by `sequences`, by parameter."""


class LoadingBackend(Backend, Protocol):
    """A backend that loads checkpoints, one after the other."""

    @property
    def info(self) -> ActorFacts:
        """What a started actor reports of itself."""

    def load(self, prepared: PreparedRun, stop: StopCheck) -> None:
        """Load the checkpoint; returns when one actor is ready or `stop` is true."""

    def open(self, directory: RunDirectory, finished: Sequence[Sequence[int]], held_positions: int = 0) -> None:
        """Open a run directory: the fitter its ledger, the writer its gradient.

        Args:
            directory: of the run.
            finished: shards of each round that a resumed run keeps.
            held_positions: most tokens whose graphs an actor may hold (see `Pass`).
        """
