"""The two actors on this node, beside the run directory: the fitter with its ledger, the writer with the gradient.

They serve one measurement after the other. One that dies is made again by Ray: the fitter goes on from its ledger, the
writer from the committed gradient, and what was being staged there is begun anew.
"""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_probe.cluster.actors.calls import ask, ask_again, kill
from ray_probe.errors import ClusterError

ANSWER_DEADLINE_S = 60.0
FILES_DEADLINE_S = 3600.0  # tens of GB are read and written on a slow disk
MAX_DEATHS = 10


class ActorHandle:
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


class RestartedHandle(ActorHandle):
    """An actor that Ray makes again, and whose methods may all be called twice."""

    def ask(self, method: str, *args: Any, deadline_s: float = ANSWER_DEADLINE_S) -> Any:
        """Call a method and wait, over a death of the actor too.

        Raises ProbeError: what it raised, or ClusterError when there is no answer.
        """
        return ask_again(self.handle, self.who, method, *args, deadline_s=deadline_s)


def on_this_node() -> dict[str, Any]:
    """`ray.remote` options of an actor on this node that needs no slot and, if nothing else is said, has one life."""
    node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": node}
