"""Where actors that need a certain node are put."""

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_probe.cluster.ray_private import HEAD_RESOURCE
from ray_probe.errors import ClusterError


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
