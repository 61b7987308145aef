"""The backend on a Ray cluster, for one measurement after another."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ray_probe.cluster.actors import actor_names
from ray_probe.cluster.actors.fitter import FitterHandle, fitter_actor
from ray_probe.cluster.actors.handle import ANSWER_DEADLINE_S
from ray_probe.cluster.actors.writer import WriterHandle, writer_actor
from ray_probe.cluster.pool.pool import Pool
from ray_probe.cluster.rounds.commit_group import CommitGroup, RoundOptions
from ray_probe.cluster.rounds.gradient_reduction import Reduction
from ray_probe.config import ProbeConfig
from ray_probe.errors import StateError
from ray_probe.gradient.layout import BUCKET_NUMBERS, ParameterLayout
from ray_probe.rollout.loader import LoadRequest
from ray_probe.run.backend import Commit, RoundOutcome, StopCheck
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import ActorFacts, ShardKey
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from ray_probe.run.progress_tracker import ProgressTracker
from ray_probe.run.result import Beta

NAME_S = 20.0
FITTER_STATE = "fitter.json"
HandleT = TypeVar("HandleT", FitterHandle, WriterHandle)


def actor_options(config: ProbeConfig) -> dict[str, Any]:
    """Return the resources and environment variables of a rollout actor."""
    cluster = config.cluster
    own = {
        "OMP_NUM_THREADS": str(cluster.cpus_per_actor),
        "TOKENIZERS_PARALLELISM": "false",
        "THP_MEM_ALLOC_ENABLE": "1",  # pages of 2 MB make allocating a large tensor four times as fast
    }
    # Ray takes the local directories of a `runtime_env` only with the connection, so the configured one is not here.
    asked: dict[str, Any] = dict(cluster.runtime_env)
    variables = {name: value for name, value in own.items() if name not in asked.get("env_vars", {})}
    return {
        "num_cpus": cluster.cpus_per_actor,
        "num_gpus": cluster.gpus_per_actor,
        "resources": dict(cluster.resources),
        "runtime_env": {"env_vars": variables},
    }


class RayBackend:
    """Rollout actors, fitter and writer on the connected cluster.

    Args:
        config: its `cluster` section gives number and resources of the actors.
        log: called with a line for each death and replacement.
        name: of the service or run, which prefixes the actors' names; None leaves them without names.
        detached: the actors outlive the process that created them.
        state: directory of the fitter's state file; None: that of the first measurement.
        bucket_numbers: numbers of the gradient moved at once.
        pool_options: further arguments of `Pool`; for tests.

    Attributes:
        pool: the rollout actors.
    """

    def __init__(
        self,
        config: ProbeConfig,
        log: Callable[[str], None] = lambda text: None,
        name: str | None = None,
        detached: bool = False,
        state: Path | None = None,
        bucket_numbers: int = BUCKET_NUMBERS,
        **pool_options: Any,
    ) -> None:
        self._config = config
        self._log = log
        self._state = state
        self._bucket_numbers = bucket_numbers
        lasting: dict[str, Any] = {"lifetime": "detached"} if detached else {}
        self.pool = Pool(config.cluster.actors, actor_options(config) | lasting, log, prefix=name, **pool_options)
        self._fitter_options = lasting | ({} if name is None else {"name": actor_names.fitter(name)})
        self._writer_options = lasting | ({} if name is None else {"name": actor_names.writer(name)})
        self._fitter: FitterHandle | None = None
        self._writer: WriterHandle | None = None
        self._prepared: PreparedRun | None = None
        self._group: CommitGroup | None = None
        self._options = RoundOptions()
        self._reported: frozenset[ShardKey] = frozenset()

    @property
    def actors(self) -> int:
        """Rollout actors asked for."""
        return self.pool.asked

    @property
    def info(self) -> ActorFacts:
        """Facts of a started actor."""
        assert self.pool.info is not None, "`load` comes first"
        return self.pool.info

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the trainable parameters."""
        return self.info.layout

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the started rollout actors, by actor."""
        return self.pool.pids

    @property
    def fitter(self) -> FitterHandle:
        """The fitter of the open measurement, for any thread.

        Raises StateError before the first measurement is opened.
        """
        fitter = self._fitter  # another thread may close the backend meanwhile
        if fitter is None:
            raise StateError("ID: no measurement has been opened yet; queue one: probe CHECKPOINT")
        return fitter

    @property
    def writer(self) -> WriterHandle:
        """The writer, open on the measurement's gradient."""
        assert self._writer is not None, "`open` comes first"
        return self._writer

    def load(self, prepared: PreparedRun, stop: StopCheck = lambda: False, wait_for: int = 1) -> None:
        """Have the actors load a checkpoint; returns once `wait_for` have, or on `stop`.

        Raises:
            ProbeError: an actor refuses the checkpoint or its device, or no actor starts.
        """
        self._group, self._prepared = None, prepared
        self.pool.load(LoadRequest.of(prepared))
        self.pool.start(wait_for, stop)

    def open(self, directory: RunDirectory, finished: Sequence[Sequence[int]] = (), held_positions: int = 0) -> None:
        """Have fitter and writer resume from a run directory; dead ones are replaced.

        Args:
            directory: the run directory.
            finished: shards of each round that a resumed run keeps.
            held_positions: positions whose graphs an actor may hold until the fit; 0: every response is scored twice.
        """
        assert self._prepared is not None, "`load` comes first"
        prepared, rule = self._prepared, baseline_rule(self._prepared.config)
        if self._fitter is None or not self._fitter.answers():
            file = (self._state or directory.path) / FITTER_STATE
            self._fitter = replaced(lambda: fitter_actor(self._fitter_options, file), self._fitter)
        if self._writer is None or not self._writer.answers():
            self._writer = replaced(lambda: writer_actor(self._writer_options, self._log), self._writer)
        self._fitter.open(rule, prepared.policy_id, directory.ledger, finished, prepared.plan_id)
        for note in self._fitter.new_notes():
            self._log(note)
        rounds = len(finished)
        gradient = directory.gradient_digests(), directory.gradient_window()
        self._writer.open(directory.state, self.layout, rounds, *gradient)
        counts = self._fitter.counts()
        self._reported = frozenset(key for key in (*counts.conflicts, *counts.regenerated) if key[0] < rounds)
        self._options = RoundOptions(rule.fit == "lagged", held_positions)
        self._group = None

    def beta(self) -> Beta:
        """Return the fitter's current global fit."""
        return self.fitter.beta(deadline_s=ANSWER_DEADLINE_S)

    def run_round(self, shards: Sequence[Shard], tracker: ProgressTracker, stop: StopCheck) -> RoundOutcome:
        """Run one round; returns once every shard is in an actor's sum, exactly once."""
        if self._group is None:
            self._group = CommitGroup(self.pool, self.fitter, tracker, stop, self._options, self._reported)
        return self._group.run_round(shards)

    def commit(self, window: int) -> Commit:
        """Add up the actors' sums and put the total on disk beside the last state."""
        assert self._group is not None, "`run_round` comes first"
        reduction = Reduction(self.pool, self.writer, self.layout, self._bucket_numbers, self._group.stop, window)
        committed, in_place = self.writer.rounds, False
        while not in_place:
            outcomes = self._group.commit(reduction, first=committed == 0)
            in_place = reduction.put_in_place(committed + len(outcomes))
        self._reported, self._group = self._group.reported, None
        self.pool.release(self.pool.leaving)
        return Commit(outcomes, self.writer.norm_sq, self.writer.cross, self.writer.sha256)

    def settle(self) -> None:
        """Remove the state before the last commit."""
        self.writer.settle()

    def save_gradient(self, path: Path, rounds: int, sequences: int) -> None:
        """Write the sum over `rounds` rounds, divided by `sequences`, by parameter name."""
        self.writer.save_gradient(path, rounds, sequences)

    def close(self) -> None:
        """Kill the actors."""
        self.pool.close()
        for handle in (self._fitter, self._writer):
            if handle is not None:
                handle.kill()
        self._fitter = self._writer = self._group = None


def replaced(create: Callable[[], HandleT], before: HandleT | None) -> HandleT:
    """Create a fitter or a writer in the place of one that is dead or does not answer."""
    if before is not None:
        before.kill()
    deadline = time.monotonic() + NAME_S
    while True:
        try:
            return create()
        except ValueError:  # Ray's ActorAlreadyExistsError: the name of a killed actor is taken for a moment
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
