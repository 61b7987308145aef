"""The nodes of the connected cluster, and calls of a function on each of them."""

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
FETCH_S = 10.0  # to fetch a small value from a node that may have died


@dataclass(frozen=True)
class Node:
    """A live node of the cluster.

    Attributes:
        id: Ray's id, hexadecimal.
        name: host name and address, for people.
        resources: its total resources, by Ray's names.
    """

    id: str
    name: str
    resources: Mapping[str, float] = field(repr=False, hash=False)


@dataclass(frozen=True)
class Answer:
    """One node's answer: the value of a function, or the error."""

    node: Node
    value: Any = None
    error: str | None = None


def alive_nodes() -> list[Node]:
    """Returns the live nodes of the connected cluster."""
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
    """Calls `function(*args)` on all nodes at once; returns their answers in order.

    Args:
        nodes: to call it on.
        function: imported there by name, so its module must be light.
        args: of the function.
        seconds: timeout; a node that misses it gets an answer with an error.
        resources: `ray.remote` options of the task's resources; None: none, so that it also runs on a full node.
    """
    task = ray.remote(function)
    references = [
        task.options(
            **{"num_cpus": 0, "max_retries": 0, **(resources or {})},
            scheduling_strategy=pinned_to(node.id),
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
    """Returns the unused resources of the whole cluster, by Ray's names."""
    return dict(ray.available_resources())


def this_node() -> str:
    """Returns the id of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def head_node() -> str:
    """Returns the id of the cluster's head node."""
    for node in alive_nodes():
        if HEAD_RESOURCE in node.resources:
            return node.id
    raise ClusterError("cluster: Ray names no head node; use a cluster of a Ray that ray_probe supports")


def pinned_to(node_id: str) -> Any:
    """Returns the scheduling strategy that places an actor on this node only."""
    return NodeAffinitySchedulingStrategy(node_id, soft=False)
