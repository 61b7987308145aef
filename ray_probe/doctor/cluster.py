"""What is looked at on the cluster: joining it, resources, packages, and the files that every node must see."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_probe.checkpoints.files import ADAPTER_FILES, CHECKPOINT_FILES, matching_files
from ray_probe.checkpoints.memory_forecast import size
from ray_probe.cluster.connection.connect import connected
from ray_probe.cluster.connection.demand import Demand, room, shortfall
from ray_probe.cluster.connection.shared_directory import check_shared
from ray_probe.doctor.checks import Case, Finding
from ray_probe.errors import CheckpointError, ClusterError, ConfigError, OutputError, bad_value
from ray_probe.system.versions import package_versions

if TYPE_CHECKING:
    from ray_probe.cluster.connection.nodes import Answer, Node

ANSWER_S = 60.0
LISTED = 3


def ray_starts(case: Case) -> Finding:
    """A private Ray comes up on this machine, runs a task, and is gone again."""
    from ray_probe.cluster.connection.nodes import alive_nodes, ask_nodes

    with connected(None, "ray_probe", Demand(0, 1, 0, {}, 1), log=_nobody) as info:
        (answer,) = ask_nodes(alive_nodes(), package_versions, seconds=ANSWER_S)
        if answer.error is not None:
            raise ClusterError(f"Ray {info.ray_version} starts here, but runs no task: {answer.error}")
    return Finding(f"Ray {info.ray_version} starts here, runs a task, and ends")


def joined(case: Case) -> Finding:
    """The cluster can be joined, or started here; the connection stays for the steps that follow."""
    from ray_probe.cluster.connection.nodes import alive_nodes

    cluster = case.cluster
    nothing = Demand(0, cluster.cpus_per_actor, cluster.gpus_per_actor, cluster.resources, cluster.slots)
    info = case.stack.enter_context(
        connected(
            cluster.address, cluster.namespace, nothing if cluster.address is None else None,
            runtime_env=dict(cluster.runtime_env), token_path=case.token_path, loopback=case.loopback, log=_nobody,
        )
    )  # fmt: skip
    case.nodes = alive_nodes()
    return Finding(
        f"{'started' if info.owned else 'joined'} Ray {info.ray_version} at {info.address}, {count(case.nodes)}"
    )


def resources(case: Case) -> Finding:
    """The actors that are asked for have room, and whether others hold it at the moment."""
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
    if case.cluster.address is None:
        cores = os.cpu_count() or 1
        if demand.actors * demand.cpus_per_actor > cores:
            return Finding(f"{detail}, which are shares of {cores} cores", "lower cluster.actors for speed")
    return Finding(detail)


def node_packages(case: Case) -> Finding:
    """Every node runs our code, with the packages of this process."""
    ours = package_versions()
    wrong = []
    for answer in ask(case.nodes, package_versions):
        theirs = answer.value or {}
        other = [f"{name} {theirs.get(name)} instead of {v}" for name, v in ours.items() if theirs.get(name) != v]
        if answer.error is not None or other:
            wrong.append(f"node {answer.node.name} has {', '.join(other)}" if answer.error is None else silent(answer))
    if wrong:
        raise ClusterError(f"cluster: {some(wrong)}; install the same on every node")
    return Finding(f"{count(case.nodes)}, with the packages of this process")


def node_checkpoint(case: Case) -> Finding:
    """Every node that can hold an actor sees the checkpoint's files, and the adapter's, of the same sizes."""
    nodes = nodes_with_room(case)
    found = case.checkpoint
    for field, place, patterns in (
        ("model.path", found.directory, CHECKPOINT_FILES),
        ("model.adapter", found.adapter, ADAPTER_FILES),
    ):
        if place is None:
            continue
        here = files_in(str(place), patterns)
        wrong = []
        for answer in ask(nodes, files_in, str(place), patterns):
            if answer.error is not None:
                wrong.append(silent(answer))
            elif answer.value != here:
                wrong.append(f"node {answer.node.name} {_difference(here, answer.value)}")
        if wrong:
            remedy = "put it on storage that all nodes share, or copy it to the same path on each"
            raise CheckpointError(bad_value(field, str(place), f"{some(wrong)}; {remedy}"))
    return Finding(f"the same files on {count(nodes)} that can hold an actor")


def model_cache(case: Case) -> Finding:
    """model.cache_dir can be written on every node that can hold an actor, and has room for the checkpoint."""
    cache, found = str(case.run.model.cache_dir), case.checkpoint
    needed = sum((files_in(str(found.directory), CHECKPOINT_FILES) or {}).values())
    nodes = nodes_with_room(case)
    wrong = []
    for answer in ask(nodes, cache_room, cache):
        if answer.error is not None:
            wrong.append(silent(answer))
        elif answer.value is None or answer.value < needed:
            has = "cannot write it" if answer.value is None else f"has {size(answer.value)} free"
            wrong.append(f"node {answer.node.name} {has}")
    if wrong:
        remedy = f"need a directory of each node's own with room for {size(needed)}"
        raise OutputError(bad_value("model.cache_dir", cache, f"{some(wrong)}; {remedy}"))
    return Finding(f"{cache} has room for {size(needed)} on {count(nodes)}")


def nodes_with_room(case: Case) -> list["Node"]:
    """The nodes that can hold at least one actor."""
    demand = Demand.of(case.run.cluster)
    return [node for node in case.nodes if room(demand, [node.resources]) != 0]


def shared_directory(case: Case) -> Finding:
    """What is written to output.dir here is read on every node."""
    directory = Path(case.run.output.dir).resolve()
    blind = check_shared(directory, case.nodes)
    if blind:
        names = some([node.name for node in blind])
        remedy = "choose a directory on storage that all nodes share"
        raise ConfigError(bad_value("output.dir", str(directory), f"it cannot be read on node {names}; {remedy}"))
    return Finding(f"{directory} is read on {count(case.nodes)}")


def files_in(directory: str, patterns: Sequence[str]) -> dict[str, int] | None:
    """Sizes of a directory's files that a pattern matches, by name, bytes; None where there is no such directory."""
    try:
        files = matching_files(Path(directory), patterns)
        return {file.name: file.stat().st_size for file in files} if Path(directory).is_dir() else None
    except OSError:
        return None


def cache_room(directory: str) -> int | None:
    """Bytes free for a directory that is there or can be made; None where we cannot write."""
    there = next(place for place in (Path(directory), *Path(directory).parents) if place.exists())
    return shutil.disk_usage(there).free if there.is_dir() and os.access(there, os.W_OK | os.X_OK) else None


def _difference(here: dict[str, int] | None, there: dict[str, int] | None) -> str:
    if there is None:
        return "does not have it"
    names = sorted(name for name, size in (here or {}).items() if there.get(name) != size) or sorted(there)
    return f"has {len(there)} files, and {names[0]} is not as it is here"


def ask(nodes: Sequence["Node"], function: Any, *args: Any, **resources: float) -> list["Answer"]:
    """Ask nodes by a task that occupies these resources (`ray.remote` options), or nothing."""
    from ray_probe.cluster.connection.nodes import ask_nodes

    return ask_nodes(nodes, function, *args, seconds=ANSWER_S, resources=resources)


def silent(answer: "Answer") -> str:
    """Of a node that gave no value."""
    return f"node {answer.node.name} could not say ({answer.error})"


def count(nodes: Sequence["Node"]) -> str:
    """`1 node`, `2 nodes`."""
    return f"{len(nodes)} node{'' if len(nodes) == 1 else 's'}"


def some(lines: Sequence[str]) -> str:
    """The first few of what is wrong on many nodes."""
    more = f" and {len(lines) - LISTED} more" if len(lines) > LISTED else ""
    return ", ".join(lines[:LISTED]) + more


def _nobody(line: str) -> None:
    """The connection's log: what it says is in our own lines."""
