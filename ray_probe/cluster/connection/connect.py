"""Connects this process to a Ray cluster, or to a private one that it starts.

A private Ray ends with the process. It listens on loopback, has a temp dir (0700) with a token of its own, and writes
nothing to the home directory, where a bare `ray.init` leaves a world-readable token. It runs in a head process (see
`cluster.head`), which this process joins like any other cluster.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_probe.cluster.connection.addresses import connected_address, find_address, on_loopback_only
from ray_probe.cluster.connection.demand import Demand, check_machine, cores, shortfall, slots_warning
from ray_probe.cluster.connection.join_check import check_joinable
from ray_probe.cluster.connection.session import is_settled, session
from ray_probe.cluster.connection.shadows import refuse_shadows
from ray_probe.cluster.head import local_head
from ray_probe.cluster.head.auth_token import require_token
from ray_probe.cluster.head.environment import env_to_join, environment, on_loopback
from ray_probe.cluster.head.local_head import Head, StartedHead
from ray_probe.errors import ClusterError, bad_value
from ray_probe.system.clock import wait_until

ROOM_S = 3.0  # the nodes of a new cluster register one after the other
ROOM_EVERY_S = 0.1


@dataclass(frozen=True)
class ClusterInfo:
    """The connected cluster.

    Attributes:
        address: host:port of its head.
        ray_version: of this process, and so of the cluster.
        nodes: number of live nodes.
        cpus: CPUs of all nodes.
        gpus: GPUs of all nodes.
        owned: this process started the cluster.
        temp_dir: directory of Ray's files; None unless `owned`.
        token_path: file of the token for other processes that join; None unless `owned`.
    """

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
    """Connects this process to a cluster for the block.

    Args:
        address: auto or host:port; None starts Ray here.
        namespace: Ray namespace of this process.
        demand: resources that the cluster must have; None: any.
        runtime_env: Ray runtime environment of this process's actors.
        token_path: `ClusterInfo.token_path` of a cluster that another ray_probe started.
        loopback: another ray_probe on this machine started the cluster.
        checked: `check_room` has just accepted this cluster.
        head: from `start_head` for this demand, ended by the caller; None: an address of None starts one.
        log: receives a line about the cluster.

    Raises:
        ClusterError: unreachable, token refused, other versions, no node here, or too small; within seconds.
        ConfigError: the address is neither auto nor host:port.
    """
    _refuse_second_connection(address)
    if demand is not None:  # a client has no actors of its own
        refuse_shadows(runtime_env or {})
    with contextlib.ExitStack() as stack:
        started: Head | None = None
        if address is None:
            assert demand is not None, "a head has a size"
            started = _ready(head or stack.enter_context(contextlib.closing(start_head(demand, checked))), demand, log)
            address, token_path, loopback, checked = started.address, started.token_path, True, True
        found = stack.enter_context(_way_in(address, token_path, loopback))
        if not checked:
            check_joinable(found)
        stack.enter_context(session({"address": found, "namespace": namespace, "runtime_env": runtime_env or None}))
        nodes = _node_resources() if demand is None else _wait_for_room(demand, _node_resources)
        info = _describe(nodes, started)
        log(
            f"cluster: {'started' if info.owned else 'joined'} Ray {info.ray_version} at {info.address}: "
            f"nodes {info.nodes}, CPUs {info.cpus:g}, GPUs {info.gpus:g}"
        )
        yield info


def _ready(head: StartedHead, demand: Demand, log: Callable[[str], None]) -> Head:
    if warning := slots_warning(demand, cores()):
        log(warning)
    return head.ready()


def start_head(demand: Demand, checked: bool = False, log: Path | None = None) -> StartedHead:
    """Starts a head on this machine and returns at once; the caller closes it.

    Args:
        demand: resources that it offers.
        checked: `check_room` has just accepted this machine.
        log: file for its output, for a head that stays.

    Raises:
        ClusterError, ConfigError: as `check_room`.
    """
    if not checked:
        check_room(None, demand)
    return local_head.start(demand.head_options(), log)


def check_room(address: str | None, demand: Demand, *, token_path: str | None = None, loopback: bool = False) -> None:
    """Raises what `connected` would raise, without starting or joining anything.

    Args:
        address: auto or host:port; None: this machine.
        demand: resources that the cluster must have.
        token_path: `ClusterInfo.token_path` of a cluster that another ray_probe started.
        loopback: another ray_probe on this machine started the cluster.

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
    """Sets the environment for joining for the block; yields host:port."""
    found = find_address(address)
    with contextlib.ExitStack() as stack:
        if loopback or on_loopback_only(found):
            stack.enter_context(on_loopback())
        stack.enter_context(environment(env_to_join(address, token_path, loopback)))
        require_token(address)
        yield found


def _refuse_second_connection(address: str | None) -> None:
    # A process has one Ray connection, and Ray's environment must not change under it.
    if not is_settled():
        remedy = "a join that this process gave up still waits for its cluster; start a new process"
        raise ClusterError(bad_value("cluster.address", address, remedy))
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        remedy = "this process is connected to a Ray cluster already; use a process of its own for this"
        raise ClusterError(bad_value("cluster.address", address, remedy))


def _node_resources() -> list[dict[str, float]]:
    from ray_probe.cluster.connection.nodes import alive_nodes

    return [dict(node.resources) for node in alive_nodes()]


def _wait_for_room(demand: Demand, look: Callable[[], list[dict[str, float]]]) -> list[dict[str, float]]:
    """Returns the nodes that `look` finds; raises ClusterError if they are too few."""
    nodes = wait_until(look, ROOM_S, ROOM_EVERY_S, lambda nodes: shortfall(demand, nodes) is None)
    if problem := shortfall(demand, nodes):
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
