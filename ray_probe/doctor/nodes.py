"""Ask the nodes of a cluster, and describe what is wrong on them."""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ray_probe.cluster.connection.demand import Demand, room
from ray_probe.doctor.checks import Case

if TYPE_CHECKING:
    from ray_probe.cluster.connection.nodes import Answer, Node

ANSWER_S = 60.0


def ask(nodes: Sequence["Node"], function: Callable[..., Any], *args: Any, **resources: float) -> "list[Answer]":
    """Run a function on each node, in a task with these `ray.remote` resources."""
    from ray_probe.cluster.connection.nodes import ask_nodes

    return ask_nodes(nodes, function, *args, seconds=ANSWER_S, resources=resources)


def problems(answers: "Iterable[Answer]", problem_of: Callable[[Any], str | None]) -> list[str]:
    """Describe each node that gave no value, or whose value has a problem."""
    lines = []
    for answer in answers:
        silent = answer.error is not None
        if problem := f"could not say ({answer.error})" if silent else problem_of(answer.value):
            lines.append(f"node {answer.node.name} {problem}")
    return lines


def nodes_with_room(case: Case) -> "list[Node]":
    """Return the nodes that can hold at least one actor."""
    demand = Demand.of(case.run.cluster)
    return [node for node in case.nodes if room(demand, [node.resources]) != 0]


def count(nodes: Sequence["Node"]) -> str:
    """Return `1 node`, `2 nodes`."""
    return f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}"
