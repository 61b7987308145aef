"""The two actors on this node, beside the run directory: the fitter with its ledger, the writer with the gradient.

They serve one measurement after the other.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_probe.cluster.actors import FitterActor, WriterActor
from ray_probe.cluster.calls import ask, kill
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


class OpenFitter(Keeper):
    """A fitter on one measurement; what is delivered for another is not taken.

    Args:
        handle: the fitter's Ray handle.
        opening: names the measurement.
    """

    def __init__(self, handle: Any, opening: str) -> None:
        super().__init__("fitter", handle)
        self.opening = opening


class FitterKeeper(Keeper):
    """The fitter."""

    def open_fitter(
        self, rule: BaselineRule, policy_id: str, ledger: Path, finished: Sequence[Sequence[int]] = ()
    ) -> OpenFitter:
        """Have it own a measurement's records, rebuilt from their ledger.

        Args:
            rule: how the baseline is formed.
            policy_id: what records are marked with.
            ledger: file of accepted records.
            finished: shards of each round that a resumed run keeps.
        """
        opening = self.ask("open", rule, policy_id, str(ledger), finished, deadline_s=FILES_DEADLINE_S)
        return OpenFitter(self.handle, opening)


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


def fitter_actor(options: Mapping[str, Any]) -> FitterKeeper:
    """Start a fitter on this node; `options` are further ones of `ray.remote`: a name, a lifetime."""
    remote = ray.remote(concurrency_groups={"queries": QUERIES_AT_ONCE})(FitterActor)
    return FitterKeeper("fitter", remote.options(**_here(), **options).remote())


def writer_actor(options: Mapping[str, Any]) -> WriterKeeper:
    """Start a writer on this node; `options` are further ones of `ray.remote`: a name, a lifetime."""
    return WriterKeeper("writer", ray.remote(WriterActor).options(**_here(), **options).remote())


def _here() -> dict[str, Any]:
    """`ray.remote` options of an actor that runs on this node, needs no slot and is not made again when it dies."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    threads = {"env_vars": {"OMP_NUM_THREADS": "1"}}
    return {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": node, "runtime_env": threads}
