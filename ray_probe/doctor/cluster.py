"""Check the cluster: joining it, its resources, and the packages of its nodes."""

import os
from typing import Any

from ray_probe.cluster.connection.connect import connected
from ray_probe.cluster.connection.demand import Demand, shortfall
from ray_probe.doctor.checks import Case, Finding
from ray_probe.doctor.nodes import ANSWER_S, ask, count, problems
from ray_probe.errors import ClusterError, some
from ray_probe.system.versions import package_versions


def ray_starts(case: Case) -> Finding:
    """Start a private Ray on this machine, run a task on it, and stop it."""
    from ray_probe.cluster.connection.nodes import alive_nodes, ask_nodes

    with connected(None, "ray_probe", Demand(0, 1, 0, {}, 1), log=_ignore) as info:
        (answer,) = ask_nodes(alive_nodes(), package_versions, seconds=ANSWER_S)
        if answer.error is not None:
            raise ClusterError(f"Ray {info.ray_version} starts here, but runs no task: {answer.error}")
    return Finding(f"Ray {info.ray_version} starts here, runs a task, and ends")


def joined(case: Case) -> Finding:
    """Join the cluster, or start one here; later steps use the connection."""
    from ray_probe.cluster.connection.nodes import alive_nodes

    cluster = case.cluster
    nothing = Demand(0, cluster.cpus_per_actor, cluster.gpus_per_actor, cluster.resources, cluster.slots)
    info = case.stack.enter_context(
        connected(
            cluster.address, cluster.namespace, nothing if cluster.address is None else None,
            runtime_env=dict(cluster.runtime_env), token_path=case.token_path, loopback=case.loopback, log=_ignore,
        )
    )  # fmt: skip
    case.nodes = alive_nodes()
    return Finding(
        f"{'started' if info.owned else 'joined'} Ray {info.ray_version} at {info.address}, {count(case.nodes)}"
    )


def resources(case: Case) -> Finding:
    """Check that the requested actors have room; a warning if others occupy it now."""
    from ray_probe.cluster.connection.nodes import free_resources

    demand = Demand.of(case.run.cluster)
    if problem := shortfall(demand, [node.resources for node in case.nodes]):
        raise ClusterError(problem)
    one = demand.per_actor()
    each = " + ".join(f"{amount:g} {name}" for name, amount in one.items()) or "nothing"
    there = {name: sum(node.resources.get(name, 0.0) for node in case.nodes) for name in ("CPU", "GPU", *one)}
    have = ", ".join(f"{amount:g} {name}" for name, amount in there.items())
    detail = f"asked {demand.actors} x ({each}), the cluster has {have}"
    free = free_resources()
    if busy := [f"{free.get(n, 0.0):g} {n}" for n, a in one.items() if demand.actors * a > free.get(n, 0.0) + 1e-9]:
        return Finding(f"{detail}, of which others leave {', '.join(busy)}", "wait for them, or ask for fewer actors")
    cores = os.cpu_count() or 1
    if case.cluster.address is None and demand.actors * demand.cpus_per_actor > cores:
        return Finding(f"{detail}, which are shares of {cores} cores", "lower cluster.actors for speed")
    return Finding(detail)


def node_packages(case: Case) -> Finding:
    """Check that every node has our code, and the package versions of this process."""
    ours = package_versions()

    def problem(theirs: dict[str, Any]) -> str | None:
        other = [f"{name} {theirs.get(name)} instead of {v}" for name, v in ours.items() if theirs.get(name) != v]
        return f"has {', '.join(other)}" if other else None

    if wrong := problems(ask(case.nodes, package_versions), problem):
        raise ClusterError(f"cluster: {some(wrong)}; install the same on every node")
    return Finding(f"{count(case.nodes)}, with the packages of this process")


def _ignore(line: str) -> None:
    """Drop a line of the connection's log; the findings say the same."""
