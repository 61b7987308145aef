"""The writer's actor and its handle: it sums gradients beside the run directory."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

from ray_probe.cluster.actors.calls import NotOpen
from ray_probe.cluster.actors.handle import (
    ANSWER_DEADLINE_S,
    FILES_DEADLINE_S,
    MAX_DEATHS,
    RestartedHandle,
    on_this_node,
)
from ray_probe.cluster.actors.own_actors import OwnActor
from ray_probe.errors import ClusterError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.store import GradientStore


class WriterActor(OwnActor):
    """Keeps the committed gradient of one measurement after the other on disk; numpy only.

    Made again after its process died, it raises NotOpen until it is told to go on. All its methods but `add` may be
    called twice.
    """

    def __init__(self) -> None:
        self._open: GradientStore | None = None

    @property
    def _store(self) -> GradientStore:
        if self._open is None:
            raise NotOpen("writer: no gradient is open")
        return self._open

    def open(self, state: str, layout: ParameterLayout, rounds: int, sha256: str | None = None) -> float:
        """Go on from the gradient summed over so many rounds, and clear up; returns its squared norm.

        `sha256` is the digest of its file that is on record (see `GradientStore.open`).
        """
        self._open = None
        store = GradientStore(Path(state), layout)
        norm_sq = store.open(rounds, sha256)
        self._open = store
        return norm_sq

    def go_on(self, state: str, layout: ParameterLayout, rounds: int, sha256: str | None = None) -> None:
        """Be what the process before was after so many committed rounds; what it was at work on may be done or not."""
        self._open = GradientStore(Path(state), layout)
        self._open.go_on(rounds, sha256)

    def ready(self) -> None:
        """Answers."""

    def pid(self) -> int:
        """Of this process."""
        return os.getpid()

    def begin(self) -> str:
        """Start to stage a commit; returns what `add` needs."""
        return self._store.begin()

    def add(self, staging: str, start: int, stop: int, part: Any) -> None:
        """Stage a bucket."""
        self._store.add(staging, start, stop, part)

    def holds(self, staging: str) -> bool:
        """Whether this commit is still being staged."""
        return self._store.holds(staging)

    def commit(self, staging: str, rounds: int) -> tuple[float, str | None]:
        """Put what is staged in place, once; returns its squared norm and its file's sha256.

        Raises NotStaged when it is gone.
        """
        return self._store.commit_once(staging, rounds), self._store.sha256

    def settle(self) -> None:
        """Remove the state before."""
        self._store.settle()

    def save_mean(self, path: str, rounds: int, sequences: int) -> None:
        """Write the mean gradient by parameter name."""
        self._store.save_mean(Path(path), rounds, sequences)


class OpenWriterHandle(RestartedHandle):
    """A writer on one measurement's gradient; told again what it is at work on whenever its process was made again.

    Args:
        handle: the writer's Ray handle.
        state: directory of the committed gradient.
        layout: names and shapes of the parameters.
        rounds: finished rounds.
        log: told of deaths, a line each.
        sha256: digest of the gradient's file after those rounds, as it is on record; None: it is taken as it is.
    """

    def __init__(
        self,
        handle: Any,
        state: Path,
        layout: ParameterLayout,
        rounds: int,
        log: Callable[[str], None],
        sha256: str | None = None,
    ) -> None:
        super().__init__("writer", handle)
        self._log = log
        self._state = str(state)
        self._layout = layout
        self._deaths = 0
        self.rounds = rounds
        self.sha256 = sha256
        self.norm_sq: float = super().ask("open", self._state, layout, rounds, sha256, deadline_s=FILES_DEADLINE_S)

    def ask(self, method: str, *args: Any, deadline_s: float = FILES_DEADLINE_S) -> Any:
        """Call a method and wait, over a death of the writer too.

        Raises:
            ProbeError: what it raised.
            ClusterError: there is no answer, or it has died too often since the last commit.
        """
        while True:
            try:
                return super().ask(method, *args, deadline_s=deadline_s)
            except NotOpen:
                self._go_on()

    def begin(self) -> str:
        """Start to stage a commit; returns what its `add` needs."""
        return str(self.ask("begin"))

    def holds(self, staging: str) -> bool:
        """Whether it has not died since this commit was begun."""
        return bool(self.ask("holds", staging))

    def commit(self, staging: str, rounds: int) -> None:
        """Put what is staged in place, once, as the sum through so many rounds. Raises NotStaged when it is gone."""
        self.norm_sq, self.sha256 = self.ask("commit", staging, rounds)
        self.rounds = rounds
        self._deaths = 0

    def _go_on(self) -> None:
        self._deaths += 1
        self._log(f"writer: its process died; it goes on from the gradient through {self.rounds} rounds")
        if self._deaths > MAX_DEATHS:
            remedy = "look at the memory of its node and at Ray's logs, then go on with run --resume"
            raise ClusterError(f"writer: its process died {self._deaths} times in one commit; {remedy}")
        super().ask("go_on", self._state, self._layout, self.rounds, self.sha256, deadline_s=ANSWER_DEADLINE_S)


class WriterHandle(RestartedHandle):
    """The writer."""

    def open_writer(
        self,
        state: Path,
        layout: ParameterLayout,
        rounds: int,
        log: Callable[[str], None] = lambda text: None,
        sha256: str | None = None,
    ) -> OpenWriterHandle:
        """Have it go on from a measurement's gradient. For the arguments see `OpenWriterHandle`.

        Raises ConfigError when the gradient cannot be read.
        """
        return OpenWriterHandle(self.handle, state, layout, rounds, log, sha256)


def writer_actor(options: Mapping[str, Any]) -> WriterHandle:
    """Start a writer on this node, made again when it dies; `options` are further ones of `ray.remote`."""
    own = on_this_node() | {"max_restarts": -1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    return WriterHandle("writer", ray.remote(WriterActor).options(**own, **options).remote())
