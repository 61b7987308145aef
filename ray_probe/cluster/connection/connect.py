"""Connecting to a Ray cluster, or starting one here that ends with us and leaves nothing behind.

A Ray that is started here is private: it listens on loopback, has a temp dir of mode 0700 with a token of its own in
it, and nothing is written to the home directory (a bare ray.init leaves a world-readable token there). It runs in a
process of its own (see `head`), which this one joins like any other cluster.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_probe.cluster.connection.addresses import connected_address
from ray_probe.cluster.connection.demand import Demand, check_machine, cores, shortfall, slots_warning
from ray_probe.cluster.connection.join_check import check_joinable, find_address, on_loopback_only
from ray_probe.cluster.connection.session import is_settled, session
from ray_probe.cluster.connection.shadows import refuse_shadows
from ray_probe.cluster.head import local_head
from ray_probe.cluster.head.auth_token import require_token
from ray_probe.cluster.head.environment import env_to_join, environment, on_loopback
from ray_probe.cluster.head.local_head import Head, StartedHead
from ray_probe.errors import ClusterError, bad_value

ROOM_S = 3.0  # nodes of a cluster that has just been started register one after the other


@dataclass(frozen=True)
class ClusterInfo:
    """The connected cluster; `temp_dir`, and `token_path` for others who join it, only when it was started here."""

    address: str
    ray_version: str
    nodes: int
    cpus: float
    gpus: float
    owned: bool
    temp_dir: str | None
    token_path: str | None


@contextlib.contextmanager
def connected(
    address: str | None,
    namespace: str,
    demand: Demand | None,
    *,
    runtime_env: dict[str, Any] | None = None,
    token_path: str | None = None,
    loopback: bool = False,
    checked: bool = False,
    head: StartedHead | None = None,
    log: Callable[[str], None],
) -> Iterator[ClusterInfo]:
    """Connect this process to the cluster at `address` (None: start Ray here), and disconnect at the end.

    A cluster started here ends with the block, its processes and temp dir too, also on exceptions and Ctrl-C.

    Args:
        address: null, auto or host:port.
        namespace: Ray namespace of this process.
        demand: what the cluster must have room for; None asks for nothing.
        runtime_env: Ray runtime environment of this process's actors.
        token_path: the token of a cluster that another ray_probe started (its `ClusterInfo.token_path`).
        loopback: the cluster was started by another ray_probe on this machine.
        checked: `check_room` has found this cluster good a moment ago.
        head: what `start_head` gave for this demand, which the caller ends; None: an address of null starts one here.
        log: told what was connected to.

    Raises:
        ClusterError: unreachable, token refused, other versions, no node here, or too small; within seconds.
        ConfigError: the address is not null, auto or host:port.
    """
    _refuse_second_connection(address)
    if demand is not None:  # a client has no actors of its own
        refuse_shadows(runtime_env or {})
    with contextlib.ExitStack() as stack:
        started: Head | None = None
        if address is None:
            assert demand is not None, "what is started here has a size"
            if head is None:
                head = stack.enter_context(contextlib.closing(start_head(demand, checked)))
            if warning := slots_warning(demand, cores()):
                log(warning)
            started = head.ready()
            address, token_path, loopback, checked = started.address, started.token_path, True, True
        found = stack.enter_context(_way_in(address, token_path, loopback))
        if not checked:
            check_joinable(found)
        stack.enter_context(session({"address": found, "namespace": namespace, "runtime_env": runtime_env or None}))
        nodes = _alive_nodes() if demand is None else _wait_for_room(demand, _alive_nodes)
        info = _describe(nodes, started)
        log(
            f"cluster: {'started' if info.owned else 'joined'} Ray {info.ray_version} at {info.address}: "
            f"nodes {info.nodes}, CPUs {info.cpus:g}, GPUs {info.gpus:g}"
        )
        yield info


def start_head(demand: Demand, checked: bool = False, log: Path | None = None) -> StartedHead:
    """Start Ray on this machine in a process of its own; returns at once. `close` it when it is not needed any more.

    Args:
        demand: what it makes room for.
        checked: `check_room` has found this machine good a moment ago.
        log: file for its words, for a head that stays; None: none.

    Raises:
        ClusterError, ConfigError: as `check_room`.
    """
    if not checked:
        check_room(None, demand)
    return local_head.start(demand.head_options(), log)


def check_room(address: str | None, demand: Demand, *, token_path: str | None = None, loopback: bool = False) -> None:
    """What `connected` refuses, told before a checkpoint is read, say; nothing is started and nothing stays connected.

    Args:
        address: null, auto or host:port.
        demand: what the cluster must have room for.
        token_path: the token of a cluster that another ray_probe started.
        loopback: the cluster was started by another ray_probe on this machine.

    Raises:
        ClusterError: as `connected`.
        ConfigError: as `connected`.
    """
    if address is None:
        check_machine(demand)
        return
    with _way_in(address, token_path, loopback) as found:
        _wait_for_room(demand, lambda: check_joinable(found))


@contextlib.contextmanager
def _way_in(address: str, token_path: str | None, loopback: bool) -> Iterator[str]:
    """The host:port to join, with the environment that this takes set for the block."""
    found = find_address(address)
    with contextlib.ExitStack() as stack:
        if loopback or on_loopback_only(found):
            stack.enter_context(on_loopback())
        stack.enter_context(environment(env_to_join(address, token_path, loopback)))
        require_token(address)
        yield found


def _refuse_second_connection(address: str | None) -> None:
    """A process has one Ray connection; nothing may be changed under one that is open, or on its way."""
    if not is_settled():
        remedy = "a join that this process gave up still waits for its cluster; start a new process"
        raise ClusterError(bad_value("cluster.address", address, remedy))
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        remedy = "this process is connected to a Ray cluster already; use a process of its own for this"
        raise ClusterError(bad_value("cluster.address", address, remedy))


def _alive_nodes() -> list[dict[str, float]]:
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _wait_for_room(demand: Demand, look: Callable[[], list[dict[str, float]]]) -> list[dict[str, float]]:
    """The resources of the nodes that `look` finds, once they hold the actors asked for; or else a ClusterError."""
    deadline = time.monotonic() + ROOM_S
    while (problem := shortfall(demand, nodes := look())) and time.monotonic() < deadline:
        time.sleep(0.1)
    if problem:
        raise ClusterError(problem)
    return nodes


def _describe(nodes: Sequence[Mapping[str, float]], started: Head | None) -> ClusterInfo:
    import ray

    return ClusterInfo(
        address=connected_address(),
        ray_version=ray.__version__,
        nodes=len(nodes),
        cpus=sum(node.get("CPU", 0.0) for node in nodes),
        gpus=sum(node.get("GPU", 0.0) for node in nodes),
        owned=started is not None,
        temp_dir=None if started is None else started.temp_dir,
        token_path=None if started is None else started.token_path,
    )
