"""The writer's actor, on the node that holds the run directory, and its handle."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray

from ray_probe.cluster.actors.calls import ArgTs, ResultT, send
from ray_probe.cluster.actors.handle import ANSWER_DEADLINE_S, FILES_DEADLINE_S, RestartedHandle, on_this_node
from ray_probe.cluster.actors.own_actors import OwnActor
from ray_probe.errors import ClusterError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.store import NO_DIGESTS, GradientStore

MAX_DEATHS = 10


class NotOpen(Exception):
    """The writer's process was restarted and has no gradient open yet."""


class WriterActor(OwnActor):
    """Keeps the committed gradient of one measurement after another on disk.

    A restarted process raises NotOpen until `go_on`. All methods but `add` are idempotent.
    """

    def __init__(self) -> None:
        self._open: GradientStore | None = None

    @property
    def _store(self) -> GradientStore:
        if self._open is None:
            raise NotOpen("writer: no gradient is open")
        return self._open

    def open(self, state: str, layout: ParameterLayout, rounds: int, sha256: Mapping[int, str], window: int) -> float:
        """Resume from the gradient of `rounds` rounds; returns its squared norm."""
        self._open = None
        store = GradientStore(Path(state), layout)
        norm_sq = store.open(rounds, sha256, window)
        self._open = store
        return norm_sq

    def go_on(self, state: str, layout: ParameterLayout, rounds: int, sha256: Mapping[int, str], window: int) -> None:
        """Resume after a restart; the commit in progress may have completed or not."""
        self._open = GradientStore(Path(state), layout)
        self._open.go_on(rounds, sha256, window)

    def begin(self, window: int) -> str:
        """Begin a commit; returns the name of its staging."""
        return self._store.begin(window)

    def add(self, staging: str, start: int, stop: int, part: Any) -> None:
        """Stage a bucket."""
        self._store.add(staging, start, stop, part)

    def holds(self, staging: str) -> bool:
        """Return whether this staging is still there."""
        return self._store.holds(staging)

    def commit(self, staging: str, rounds: int) -> tuple[float, float, str | None]:
        """Commit what is staged, once; returns its squared norm, `cross` and sha256.

        Raises NotStaged when the staging is lost.
        """
        return self._store.commit_once(staging, rounds), self._store.cross, self._store.sha256

    def settle(self) -> None:
        """Remove the state before the last commit."""
        self._store.settle()

    def save_gradient(self, path: str, rounds: int, sequences: int) -> None:
        """Write the mean gradient by parameter name."""
        self._store.save_mean(Path(path), rounds, sequences)


class WriterHandle(RestartedHandle[WriterActor]):
    """The handle of the writer; it reopens the gradient after a restart and retries.

    Args:
        actor: Ray's handle.
        log: called with a line for each death.

    Attributes:
        rounds: committed rounds of the open gradient.
        norm_sq: squared norm of the gradient summed over them.
        cross: product of the last commit's gradient with the earlier commits of its window.
    """

    def __init__(self, actor: WriterActor, log: Callable[[str], None] = lambda text: None) -> None:
        super().__init__("writer", actor)
        self._log = log
        self._deaths = self.rounds = 0
        self.norm_sq = self.cross = 0.0
        self._window = 0
        self._digests: dict[int, str] = {}

    @property
    def sha256(self) -> str | None:
        """Digest of the gradient's file, hexadecimal; None before a commit."""
        return self._digests.get(self.rounds)

    def open(
        self, state: Path, layout: ParameterLayout, rounds: int, sha256: Mapping[int, str] = NO_DIGESTS, window: int = 0
    ) -> None:
        """Resume from a measurement's committed gradient.

        Args:
            state: directory of the gradient.
            layout: names and shapes of the parameters.
            rounds: committed rounds.
            sha256: recorded digests of the gradient's files, by rounds; a file without one is not checked.
            window: rounds before the window of the last commit.

        Raises:
            ConfigError: the gradient cannot be read.
        """
        self._state, self._layout = str(state), layout
        self._deaths, self.rounds, self._window, self._digests = 0, rounds, window, dict(sha256)
        self.norm_sq = self._call(self.actor.open, self._state, layout, rounds, dict(sha256), window)

    def begin(self, window: int) -> str:
        """Begin a commit; returns the name of its staging.

        Args:
            window: rounds before the window of this commit (see `GradientStore.begin`).
        """
        self._window = window
        return self._call(self.actor.begin, window)

    def add(self, staging: str, start: int, stop: int, part: Any) -> Any:
        """Stage a bucket; returns a reference that is ready once it is on disk.

        `part` is Ray's reference to the bucket.
        """
        return send(self.actor.add, staging, start, stop, part)

    def holds(self, staging: str) -> bool:
        """Return whether this staging is still there; a restart of the actor loses it."""
        return self._call(self.actor.holds, staging)

    def commit(self, staging: str, rounds: int) -> None:
        """Commit what is staged as the sum through `rounds` rounds.

        Raises NotStaged when the staging is lost.
        """
        self.norm_sq, self.cross, sha256 = self._call(self.actor.commit, staging, rounds)
        self.rounds, self._deaths = rounds, 0
        if sha256 is not None:
            self._digests[rounds] = sha256

    def settle(self) -> None:
        """Remove the state before the last commit."""
        self._call(self.actor.settle)

    def save_gradient(self, path: Path, rounds: int, sequences: int) -> None:
        """Write the sum over `rounds` rounds, divided by `sequences`, by parameter name."""
        self._call(self.actor.save_gradient, str(path), rounds, sequences)

    def _call(
        self, method: Callable[[*ArgTs], ResultT], *args: *ArgTs, deadline_s: float = FILES_DEADLINE_S
    ) -> ResultT:
        """Call a method; reopen the gradient and retry after a restart.

        Raises:
            ProbeError: the method raised it.
            ClusterError: no answer, or the actor died too often since the last commit.
        """
        while True:
            try:
                return super()._call(method, *args, deadline_s=deadline_s)
            except NotOpen:
                self._go_on()

    def _go_on(self) -> None:
        self._deaths += 1
        self._log(f"writer: its process died; it goes on from the gradient through {self.rounds} rounds")
        if self._deaths > MAX_DEATHS:
            remedy = "look at the memory of its node and at Ray's logs, then go on with run --resume"
            raise ClusterError(f"writer: its process died {self._deaths} times in one commit; {remedy}")
        arguments = self._state, self._layout, self.rounds, dict(self._digests), self._window
        super()._call(self.actor.go_on, *arguments, deadline_s=ANSWER_DEADLINE_S)


def writer_actor(options: Mapping[str, Any], log: Callable[[str], None] = lambda text: None) -> WriterHandle:
    """Start a writer on this node that Ray restarts.

    Args:
        options: further options of `ray.remote`: a name, a lifetime.
        log: called with a line for each death.
    """
    own = on_this_node() | {"max_restarts": -1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    return WriterHandle(ray.remote(WriterActor).options(**own, **options).remote(), log)
