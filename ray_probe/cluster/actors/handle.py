"""Base classes of typed actor handles, whose methods mirror the actor's class."""

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from ray_probe.cluster.actors.calls import ArgTs, ResultT, call, call_restarted, kill
from ray_probe.cluster.actors.own_actors import OwnActor
from ray_probe.cluster.connection.nodes import pinned_to, this_node
from ray_probe.errors import ClusterError

ANSWER_DEADLINE_S = 60.0
FILES_DEADLINE_S = 3600.0  # tens of GB are read and written on a slow disk

ActorT = TypeVar("ActorT", bound=OwnActor)


class ActorHandle(Generic[ActorT]):
    """The handle of a singleton actor.

    Args:
        name: the actor, for messages.
        actor: Ray's handle, typed as the class behind it.
    """

    def __init__(self, name: str, actor: ActorT) -> None:
        self.name = name
        self.actor = actor

    def pid(self) -> int:
        """Return the id of the actor's process."""
        return self._call(self.actor.pid, deadline_s=ANSWER_DEADLINE_S)

    def answers(self) -> bool:
        """Return whether the actor answers."""
        try:
            self.pid()
        except ClusterError:
            return False
        return True

    def kill(self) -> None:
        """End the actor for good."""
        kill(self.actor)

    def _call(
        self, method: Callable[[*ArgTs], ResultT], *args: *ArgTs, deadline_s: float = ANSWER_DEADLINE_S
    ) -> ResultT:
        """Call a method once."""
        return call(self.name, method, *args, deadline_s=deadline_s)


class RestartedHandle(ActorHandle[ActorT]):
    """The handle of an actor that Ray restarts and whose methods are idempotent."""

    def _call(
        self, method: Callable[[*ArgTs], ResultT], *args: *ArgTs, deadline_s: float = ANSWER_DEADLINE_S
    ) -> ResultT:
        """Call a method, and retry while Ray restarts the actor."""
        return call_restarted(self.name, method, *args, deadline_s=deadline_s)


def on_this_node() -> dict[str, Any]:
    """Return options of an actor on this node that takes no CPU, without restarts."""
    return {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": pinned_to(this_node())}
