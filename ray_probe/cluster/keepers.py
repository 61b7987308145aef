"""The two actors on this node, beside the run directory: the fitter with its ledger, the writer with the gradient.

They serve one measurement after the other. A fitter that dies is made again by Ray and goes on from its ledger.
"""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_probe.cluster.actors import FitterActor, WriterActor
from ray_probe.cluster.calls import ask, kill
from ray_probe.cluster.delivery import ask_again
from ray_probe.core.baselines import BaselineRule
from ray_probe.errors import ClusterError
from ray_probe.layout import Layout

ANSWER_DEADLINE_S = 60.0
FILES_DEADLINE_S = 3600.0  # tens of GB are read and written on a slow disk
QUERIES_AT_ONCE = 2


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

    def __init__(self, handle: Any, opening: str) -> None:
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


class WriterKeeper(Keeper):
    """The writer."""

    def open_writer(self, state: Path, layout: Layout, rounds: int) -> float:
        """Have it go on from a measurement's gradient; returns its squared norm.

        Args:
            state: directory of the committed gradient.
            layout: names and shapes of the parameters.
            rounds: finished rounds.
        """
        return float(self.ask("open", str(state), layout, rounds, deadline_s=FILES_DEADLINE_S))


def fitter_actor(options: Mapping[str, Any], state: Path | None = None) -> FitterKeeper:
    """Start a fitter on this node, without an environment of its own: a worker that Ray has ready becomes it at once.

    Args:
        options: further ones of `ray.remote`: a name, a lifetime.
        state: file in which it keeps what it is open on, so that Ray can make it again when it dies; None: it cannot.
    """
    remote = ray.remote(concurrency_groups={"queries": QUERIES_AT_ONCE})(FitterActor)
    own = _here() | ({} if state is None else {"max_restarts": -1})
    file = None if state is None else str(state)
    return FitterKeeper("fitter", remote.options(**own, **options).remote(file, secrets.token_hex(8)), state)


def writer_actor(options: Mapping[str, Any]) -> WriterKeeper:
    """Start a writer on this node; `options` are further ones of `ray.remote`: a name, a lifetime."""
    threads = {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    return WriterKeeper("writer", ray.remote(WriterActor).options(**_here(), **threads, **options).remote())


def _here() -> dict[str, Any]:
    """`ray.remote` options of an actor on this node that needs no slot and, if nothing else is said, has one life."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": node}
