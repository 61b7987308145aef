"""A controller's workers in this process: real rollouts on a real checkpoint, no Ray."""

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_probe.controller.local_backend import LocalBackend
from ray_probe.controller.replies import Scaled
from ray_probe.fitter.fitter import Fitter
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.rollout.builder import RolloutBuilder
from ray_probe.run.backend import Commit, RoundOutcome, StopCheck
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule
from ray_probe.run.progress_tracker import ProgressTracker
from ray_probe.run.result import Beta


class InProcessWorkers:
    """One rollout; `gate` lets a test hold every round until it says so."""

    def __init__(self) -> None:
        self.asked = 1
        self.ways: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.in_round = threading.Event()
        self.closed = False
        self._assembly = RolloutBuilder()
        self.prepared: PreparedRun | None = None
        self._backend: LocalBackend | None = None

    actors = property(lambda self: self.asked)
    info: ActorFacts

    @property
    def layout(self) -> ParameterLayout:
        return self._rollout.layout

    @property
    def _at_work(self) -> LocalBackend:
        assert self._backend is not None, "a run directory is open"
        return self._backend

    def load(self, prepared: PreparedRun, stop: StopCheck) -> None:
        config, directory = prepared.config, prepared.checkpoint.directory
        self._rollout = self._assembly.load(config, directory, prepared.checkpoint.adapter, prepared.policy_id)
        self.ways.append(self._assembly.way)
        self.prepared = prepared
        frozen, cache_gap = self._rollout.frozen, self._rollout.cache_gap
        self.info = ActorFacts(self.layout, "cpu", 1, 10**9, frozen=frozen, cache_gap=cache_gap)

    def open(self, directory: RunDirectory, finished: Sequence[Sequence[int]], held_positions: int = 0) -> None:
        assert self.prepared is not None
        rule = baseline_rule(self.prepared.config)
        self._backend = LocalBackend(
            [self._rollout], rule, self.prepared.policy_id, directory, held_positions=held_positions
        )

    def run_round(self, shards: Sequence[Shard], tracker: ProgressTracker, stop: StopCheck) -> RoundOutcome:
        self.in_round.set()
        while not self.gate.wait(0.01) and not stop():
            pass
        return self._at_work.run_round(shards, tracker, stop)

    def commit(self, window: int) -> Commit:
        return self._at_work.commit(window)

    def settle(self) -> None:
        self._at_work.settle()

    def save_gradient(self, path: Path, rounds: int, sequences: int) -> None:
        self._at_work.save_gradient(path, rounds, sequences)

    def beta(self) -> Beta:
        return self._at_work.beta()

    def tend(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def scale(self, actors: int) -> Scaled:
        self.asked = actors
        return Scaled(actors, 1, 1, ())

    def census(self) -> Mapping[str, Any]:
        return {
            "namespace": "test", "actors_asked": self.asked, "actors_alive": 1, "actors": (), "last_failure": None,
            "nodes": 1, "resources": {}, "free": {}, "warnings": (),
        }  # fmt: skip

    @property
    def fitter(self) -> Fitter:
        return self._at_work.fitter
