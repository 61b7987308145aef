"""The probe's work on a Ray cluster: rollout actors, a fitter and a writer, for one measurement after another."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ray_probe.cluster.actors import actor_names
from ray_probe.cluster.actors.fitter import FitterHandle, fitter_actor
from ray_probe.cluster.actors.handle import ActorHandle
from ray_probe.cluster.actors.writer import WriterHandle, writer_actor
from ray_probe.cluster.pool.pool import Pool
from ray_probe.cluster.rounds.commit_group import RoundOptions
from ray_probe.cluster.rounds.open_measurement import OpenMeasurement
from ray_probe.config import ProbeConfig
from ray_probe.gradient.layout import BUCKET_NUMBERS, ParameterLayout
from ray_probe.rollout.loader import LoadRequest
from ray_probe.run.backend import RoundOutcome, StopCheck
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import ActorFacts
from ray_probe.run.plan import Shard
from ray_probe.run.prepared import PreparedRun, baseline_rule
from ray_probe.run.progress_tracker import ProgressTracker
from ray_probe.run.result import Beta

NAME_S = 20.0
FITTER_STATE = "fitter.json"
HandleT = TypeVar("HandleT", bound=ActorHandle)


def actor_options(config: ProbeConfig) -> dict[str, Any]:
    """`ray.remote` options of a rollout actor: its resources, one thread a CPU that it was given, and large pages.

    With `THP_MEM_ALLOC_ENABLE` torch asks Linux for pages of 2 MB, which a fresh table is made of four times as fast.
    The configured `runtime_env` belongs to the connection (Ray takes local directories only there).
    """
    cluster = config.cluster
    own = {
        "OMP_NUM_THREADS": str(cluster.cpus_per_actor),
        "TOKENIZERS_PARALLELISM": "false",
        "THP_MEM_ALLOC_ENABLE": "1",
    }
    asked: dict[str, Any] = dict(cluster.runtime_env)
    variables = {name: value for name, value in own.items() if name not in asked.get("env_vars", {})}
    return {
        "num_cpus": cluster.cpus_per_actor,
        "num_gpus": cluster.gpus_per_actor,
        "resources": dict(cluster.resources),
        "runtime_env": {"env_vars": variables},
    }


class RayBackend:
    """Rollout actors, fitter and writer on the cluster that this process is connected to.

    Args:
        config: what the cluster's part of is used: resources and number of actors.
        log: told of deaths and replacements, one line each.
        name: of the service or run, which the actors' names begin with; None leaves them without.
        detached: the actors outlive the process that made them.
        state: directory in which the fitter keeps what it is open on; None: in that of the first measurement.
        bucket_numbers: numbers of the gradient that are moved at once.
        pool_options: passed on to `Pool`; for tests.
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
        options = actor_options(config) | lasting
        self._pool = Pool(config.cluster.actors, options, log, prefix=name, **pool_options)
        self._fitter_options = lasting | ({} if name is None else {"name": actor_names.fitter(name)})
        self._writer_options = lasting | ({} if name is None else {"name": actor_names.writer(name)})
        self._fitter: FitterHandle | None = None
        self._writer: WriterHandle | None = None
        self._prepared: PreparedRun | None = None
        self._open: OpenMeasurement | None = None

    @property
    def actors(self) -> int:
        """Rollout actors asked for."""
        return self._pool.asked

    @property
    def info(self) -> ActorFacts:
        """What a started actor reports of itself."""
        assert self._pool.info is not None, "`load` comes first"
        return self._pool.info

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the trainable parameters."""
        return self.info.layout

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the started rollout actors, by actor."""
        return self._pool.pids

    @property
    def gradient_norm_sq(self) -> float:
        """Squared norm of the gradient summed over all rounds committed so far."""
        return self._rounds.gradient_norm_sq

    @property
    def gradient_sha256(self) -> str | None:
        """Digest of the file that holds that gradient, hexadecimal; None before a commit."""
        return self._rounds.gradient_sha256

    def load(self, prepared: PreparedRun, stop: StopCheck = lambda: False, wait_for: int = 1) -> None:
        """Have the actors load a checkpoint; returns when so many have, or `stop` says so.

        Raises:
            ProbeError: the checkpoint or the device is refused by an actor, or no actor starts.
        """
        self._open, self._prepared = None, prepared
        self._pool.load(LoadRequest.of(prepared))
        self._pool.start(wait_for, stop)

    def open(self, directory: RunDirectory, finished: Sequence[Sequence[int]] = (), held_positions: int = 0) -> None:
        """Have fitter and writer, on this node, go on from what a run directory holds; one that died is made again.

        Args:
            directory: of the run.
            finished: shards of each round that a resumed run keeps.
            held_positions: whose graphs an actor may hold until the fit is there; 0: everything is scored twice.
        """
        assert self._prepared is not None, "`load` comes first"
        rule = baseline_rule(self._prepared.config)
        if self._fitter is None or not self._fitter.answers():
            file = (self._state or directory.path) / FITTER_STATE
            self._fitter = again(lambda: fitter_actor(self._fitter_options, file), self._fitter)
        if self._writer is None or not self._writer.answers():
            self._writer = again(lambda: writer_actor(self._writer_options), self._writer)
        prepared = self._prepared
        fitter = self._fitter.open_fitter(rule, prepared.policy_id, directory.ledger, finished, prepared.plan_id)
        for note in fitter.new_notes():
            self._log(note)
        recorded = directory.gradient_sha256(len(finished))
        writer = self._writer.open_writer(directory.state, self.layout, len(finished), self._log, recorded)
        manner = RoundOptions(rule.fit == "lagged", held_positions)
        self._open = OpenMeasurement(self._pool, fitter, writer, self.layout, manner, self._bucket_numbers)

    def beta(self) -> Beta:
        """The fitter's current global fit."""
        return self._rounds.beta()

    def run_round(self, shards: Sequence[Shard], tracker: ProgressTracker, stop: StopCheck) -> RoundOutcome:
        """Work one round off; returns when every shard is in an actor's sum, once."""
        return self._rounds.run_round(shards, tracker, stop)

    def commit(self) -> list[RoundOutcome]:
        """Bring the actors' sums together and put them on disk."""
        return self._rounds.commit()

    def settle(self) -> None:
        """The committed rounds count now: the state before them can go."""
        self._rounds.settle()

    def save_gradient(self, path: Path, rounds: int, sequences: int) -> None:
        """Write the gradient summed over so many rounds, divided by the responses, by parameter name."""
        self._rounds.save_gradient(path, rounds, sequences)

    def close(self) -> None:
        """Kill the actors."""
        self._pool.close()
        for keeper in (self._fitter, self._writer):
            if keeper is not None:
                keeper.close()
        self._fitter = self._writer = self._open = None

    @property
    def _rounds(self) -> OpenMeasurement:
        assert self._open is not None, "`open` comes first"
        return self._open


def again(create: Callable[[], HandleT], before: ActorHandle | None) -> HandleT:
    """Make a fitter or a writer, in the place of one that is gone or does not answer: its name is free in a moment."""
    if before is not None:
        before.close()
    deadline = time.monotonic() + NAME_S
    while True:
        try:
            return create()
        except ValueError:  # Ray's ActorAlreadyExistsError
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.1)
