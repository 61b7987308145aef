"""Asking every node of the cluster the same question, by a task that is pinned to it, with a deadline."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_probe.cluster.connection.ray_errors import first_line, task_error
from ray_probe.cluster.head.ray_private import HEAD_RESOURCE
from ray_probe.errors import ClusterError

ASK_S = 60.0  # a node's first task starts a worker process there: about 1 s, or as long as its runtime_env takes
FETCH_S = 10.0  # an answer that is there is small, and comes from a node that may be gone by now


@dataclass(frozen=True)
class Node:
    """A node of the cluster that is alive.

    Attributes:
        id: Ray's id, hexadecimal.
        name: host name and address, for people.
        resources: what it has in all, by Ray's names.
    """

    id: str
    name: str
    resources: Mapping[str, float] = field(repr=False, hash=False)


@dataclass(frozen=True)
class Answer:
    """What came from one node: the function's value, or why there is none."""

    node: Node
    value: Any = None
    error: str | None = None


def alive_nodes() -> list[Node]:
    """The nodes of the cluster that this process is connected to."""
    return [
        Node(node["NodeID"], f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})", dict(node["Resources"]))
        for node in ray.nodes()
        if node["Alive"]
    ]


def ask_nodes(
    nodes: Sequence[Node],
    function: Callable[..., Any],
    *args: Any,
    seconds: float = ASK_S,
    resources: Mapping[str, Any] | None = None,
) -> list[Answer]:
    """Call `function(*args)` on every node, all at once; an answer a node, in their order.

    Args:
        nodes: whom to ask.
        function: it is imported by name there, so its module must be light.
        args: its arguments.
        seconds: what has not answered by then is given up, and the answer says so.
        resources: `ray.remote` options that say what the task occupies; None: nothing, so that it runs on a full node.
    """
    task = ray.remote(function)
    references = [
        task.options(
            **{"num_cpus": 0, "max_retries": 0, **(resources or {})},
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False),
        ).remote(*args)
        for node in nodes
    ]
    done, late = ray.wait(references, num_returns=len(references), timeout=seconds) if references else ([], [])
    for reference in late:
        ray.cancel(reference, force=True)
    in_time = set(done)
    return [
        _answer(node, reference) if reference in in_time else Answer(node, error=f"no answer within {seconds:g} s")
        for node, reference in zip(nodes, references, strict=True)
    ]


def _answer(node: Node, reference: Any) -> Answer:
    try:
        return Answer(node, ray.get(reference, timeout=FETCH_S))
    except RayError as error:
        return Answer(node, error=first_line(task_error(error)))


def free_resources() -> dict[str, float]:
    """The amounts that no actor or task holds, by name of resource, over the whole cluster."""
    free: dict[str, float] = ray.available_resources()
    return free


def this_node() -> str:
    """Id of the node that this process runs on."""
    node: str = ray.get_runtime_context().get_node_id()
    return node


def head_node() -> str:
    """Id of the cluster's head."""
    for node in ray.nodes():
        if node["Alive"] and HEAD_RESOURCE in node["Resources"]:
            return str(node["NodeID"])
    raise ClusterError("cluster: Ray names no head node; use a cluster of a Ray that ray_probe supports")


def pinned_to(node_id: str) -> Any:
    """The scheduling strategy that places an actor on this node or nowhere."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)
