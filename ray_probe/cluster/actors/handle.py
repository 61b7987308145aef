"""The two actors on this node, beside the run directory: the fitter with its ledger, the writer with the gradient.

They serve one measurement after the other. One that dies is made again by Ray: the fitter goes on from its ledger, the
writer from the committed gradient, and what was being staged there is begun anew.
"""

import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_probe.cluster.actors.calls import ask, kill
from ray_probe.cluster.actors.delivery import ask_again
from ray_probe.cluster.actors.rollout import FitterActor, NotOpen, WriterActor
from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.errors import ClusterError
from ray_probe.gradient.layout import Layout
from ray_probe.run.messages import Opening

ANSWER_DEADLINE_S = 60.0
FILES_DEADLINE_S = 3600.0  # tens of GB are read and written on a slow disk
FITTER_THREADS = {"queries": 2, "records": 16}
"""Besides its own: for what is asked meanwhile, and for deliveries that share a write to the ledger."""
MAX_DEATHS = 10


class Keeper:
    """An actor of which there is one.

    Args:
        who: what it is called in messages.
        handle: its Ray handle.
    """

    def __init__(self, who: str, handle: Any) -> None:
        self.who = who
        self.handle = handle

    def ask(self, method: str, *args: Any, deadline_s: float = ANSWER_DEADLINE_S) -> Any:
        """Call a method and wait. Raises ProbeError: what it raised, or ClusterError when there is no answer."""
        return ask(self.handle, self.who, method, *args, deadline_s=deadline_s)

    def answers(self) -> bool:
        """Whether the actor is there."""
        try:
            self.ask("ready")
        except ClusterError:
            return False
        return True

    def close(self) -> None:
        """End the actor."""
        kill(self.handle)


class _Lasting(Keeper):
    """An actor that Ray makes again, and whose methods may all be called twice."""

    def ask(self, method: str, *args: Any, deadline_s: float = ANSWER_DEADLINE_S) -> Any:
        """Call a method and wait, over a death of the actor too.

        Raises ProbeError: what it raised, or ClusterError when there is no answer.
        """
        return ask_again(self.handle, self.who, method, *args, deadline_s=deadline_s)


class OpenFitter(_Lasting):
    """A fitter on one measurement; what is delivered for another is not taken.

    Args:
        handle: the fitter's Ray handle.
        opening: names the measurement.
    """

    def __init__(self, handle: Any, opening: Opening) -> None:
        super().__init__("fitter", handle)
        self.opening = opening
        self._told: set[str] = set()

    def new_notes(self) -> list[str]:
        """What the run's log should say since it was last asked: of a death, a torn ledger, other bytes."""
        notes = [note for note in self.ask("notes") if note not in self._told]
        self._told |= set(notes)
        return notes


class FitterKeeper(_Lasting):
    """The fitter.

    Args:
        who: what it is called in messages.
        handle: its Ray handle.
        state: file in which it keeps what it is open on; None: none.
    """

    def __init__(self, who: str, handle: Any, state: Path | None = None) -> None:
        super().__init__(who, handle)
        self._state = state

    def open_fitter(
        self, rule: BaselineRule, policy_id: str, ledger: Path, finished: Sequence[Sequence[int]] = (), run: str = ""
    ) -> OpenFitter:
        """Have it own a measurement's records, rebuilt from their ledger.

        Args:
            rule: how the baseline is formed.
            policy_id: what records are marked with.
            ledger: file of accepted records.
            finished: shards of each round that a resumed run keeps.
            run: names what else records must agree on.
        """
        opening = self.ask("open", rule, policy_id, str(ledger), finished, run, deadline_s=FILES_DEADLINE_S)
        return OpenFitter(self.handle, opening)

    def close(self) -> None:
        """End the actor."""
        super().close()
        if self._state is not None:
            self._state.unlink(missing_ok=True)


class OpenWriter(_Lasting):
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
        layout: Layout,
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


class WriterKeeper(_Lasting):
    """The writer."""

    def open_writer(
        self,
        state: Path,
        layout: Layout,
        rounds: int,
        log: Callable[[str], None] = lambda text: None,
        sha256: str | None = None,
    ) -> OpenWriter:
        """Have it go on from a measurement's gradient. For the arguments see `OpenWriter`.

        Raises ConfigError when the gradient cannot be read.
        """
        return OpenWriter(self.handle, state, layout, rounds, log, sha256)


def fitter_actor(options: Mapping[str, Any], state: Path | None = None) -> FitterKeeper:
    """Start a fitter on this node, without an environment of its own: a worker that Ray has ready becomes it at once.

    Args:
        options: further ones of `ray.remote`: a name, a lifetime.
        state: file in which it keeps what it is open on, so that Ray can make it again when it dies; None: it cannot.
    """
    remote = ray.remote(concurrency_groups=FITTER_THREADS)(FitterActor)
    own = _here() | ({} if state is None else {"max_restarts": -1})
    file = None if state is None else str(state)
    return FitterKeeper("fitter", remote.options(**own, **options).remote(file, secrets.token_hex(8)), state)


def writer_actor(options: Mapping[str, Any]) -> WriterKeeper:
    """Start a writer on this node, made again when it dies; `options` are further ones of `ray.remote`."""
    own = _here() | {"max_restarts": -1, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    return WriterKeeper("writer", ray.remote(WriterActor).options(**own, **options).remote())


def _here() -> dict[str, Any]:
    """`ray.remote` options of an actor on this node that needs no slot and, if nothing else is said, has one life."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": node}
