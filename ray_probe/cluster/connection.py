"""Connecting to a Ray cluster, or starting one here that ends with us and leaves nothing behind.

A Ray that is started here is private: it listens on loopback, has a temp dir of mode 0700 with a token of its own in
it, and nothing is written to the home directory (a bare ray.init leaves a world-readable token there). Ctrl-C needs
no care: Ray blocks SIGINT in the processes that it starts and puts workers in process groups of their own, so they
outlive the driver's KeyboardInterrupt and are shut down in order.
"""

import contextlib
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_probe.cluster.addresses import connected_address
from ray_probe.cluster.environment import (
    env_to_join,
    env_to_start,
    environment,
    on_loopback,
    private_dir,
    require_token,
)
from ray_probe.cluster.reach import check_joinable, find_address, on_loopback_only
from ray_probe.cluster.session import is_settled, session
from ray_probe.errors import ClusterError, bad_value
from ray_probe.layout import BUCKET_NUMBERS

if TYPE_CHECKING:
    from ray_probe.config import ClusterConfig

ROOM_S = 3.0  # nodes of a cluster that has just been started register one after the other
MIN_STORE_BYTES = 2**28
STORE_BYTES_A_SLOT = 2 * 4 * BUCKET_NUMBERS  # a bucket of the gradient that comes in and one that goes out


@dataclass(frozen=True)
class Demand:
    """What a run asks of the cluster; `slots` is how many actors a Ray that is started here makes room for."""

    actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    resources: Mapping[str, float]
    slots: int

    @classmethod
    def of(cls, cluster: "ClusterConfig") -> "Demand":
        """What a run with this configuration asks of its cluster."""
        return cls(cluster.actors, cluster.cpus_per_actor, cluster.gpus_per_actor, cluster.resources, cluster.slots)

    def per_actor(self) -> dict[str, float]:
        """Amounts for one actor under Ray's names, zeros left out."""
        asked = {"CPU": self.cpus_per_actor, "GPU": self.gpus_per_actor, **self.resources}
        return {name: amount for name, amount in asked.items() if amount > 0}


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
        log: told what was connected to.

    Raises:
        ClusterError: unreachable, token refused, other versions, no node here, or too small; within seconds.
        ConfigError: the address is not null, auto or host:port.
    """
    _refuse_second_connection(address)
    with contextlib.ExitStack() as stack:
        temp_dir: str | None = None
        if address is None:
            assert demand is not None, "what is started here has a size"
            if warning := slots_warning(demand, os.cpu_count() or 1):
                log(warning)
            if not checked:
                check_room(None, demand)
            temp_dir = stack.enter_context(private_dir())
            stack.enter_context(environment(env_to_start(temp_dir)))
            require_token(address)
            stack.enter_context(on_loopback())
            where = _local_options(demand, temp_dir)
        else:
            found = stack.enter_context(_way_in(address, token_path, loopback))
            if not checked:
                check_joinable(found)
            where = {"address": found}
        stack.enter_context(session({**where, "namespace": namespace, "runtime_env": runtime_env or None}, temp_dir))
        nodes = _alive_nodes() if demand is None else _wait_for_room(demand, _alive_nodes)
        info = _describe(nodes, temp_dir)
        log(
            f"cluster: {'started' if info.owned else 'joined'} Ray {info.ray_version} at {info.address}: "
            f"nodes {info.nodes}, CPUs {info.cpus:g}, GPUs {info.gpus:g}"
        )
        yield info


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
        if problem := shortfall(
            demand, [{"CPU": _slot_cpus(demand), "GPU": _gpus_here() if demand.gpus_per_actor else 0.0}]
        ):
            raise ClusterError(problem)
        return
    with _way_in(address, token_path, loopback) as found:
        _wait_for_room(demand, lambda: check_joinable(found))


def slots_warning(demand: Demand, cores: int) -> str | None:
    """A line when the slots declare more CPUs than the machine has: the actors then slow each other down."""
    if demand.slots * demand.cpus_per_actor <= cores:
        return None
    return f"cluster: {demand.slots} slots x {demand.cpus_per_actor:g} CPU will share this machine's {cores} cores"


def shortfall(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why the actors cannot all be placed on nodes with these resources, in one line, or None when they can."""
    one = demand.per_actor()
    for name, amount in one.items():
        total = sum(node.get(name, 0.0) for node in nodes)
        if demand.actors * amount > total + 1e-9:
            field = {"CPU": "cpus_per_actor", "GPU": "gpus_per_actor"}.get(name, "resources")
            have = f"asked {demand.actors} x {amount:g} {name}, the cluster has {total:g}"
            return f"cluster.{field}: {have}; ask for fewer actors or less for each, or add nodes"
    there = room(demand, nodes)
    if there is None or there >= demand.actors:
        return None
    each = " + ".join(f"{amount:g} {name}" for name, amount in one.items())
    return f"cluster.actors: asked {demand.actors} x ({each}), and the {len(nodes)} node(s) have room for {there}"


def room(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> int | None:
    """Actors that nodes with these resources can hold in all; None: any number, as an actor asks for nothing."""
    one = demand.per_actor()
    return sum(min(int(node.get(n, 0.0) / a + 1e-9) for n, a in one.items()) for node in nodes) if one else None


@contextlib.contextmanager
def _way_in(address: str, token_path: str | None, loopback: bool) -> Iterator[str]:
    """The host:port to join, with the environment that this takes set for the block."""
    found = find_address(address)
    with contextlib.ExitStack() as stack:
        if loopback or on_loopback_only(found):
            stack.enter_context(on_loopback())
        stack.enter_context(environment(env_to_join(address, token_path)))
        require_token(address)
        yield found


def _slot_cpus(demand: Demand) -> int:
    """CPUs that a Ray that is started here declares."""
    return max(1, math.ceil(demand.slots * demand.cpus_per_actor))


def _gpus_here() -> float:
    """GPUs that a Ray that is started here will find, by its own count; any number on a Ray that does not say."""
    try:
        from ray._private.accelerators import get_accelerator_manager_for_resource

        gpus = get_accelerator_manager_for_resource("GPU")
        visible = gpus.get_current_process_visible_accelerator_ids()
        return gpus.get_current_node_num_accelerators() if visible is None else len(visible)
    except (ImportError, AttributeError):
        return math.inf


def _local_options(demand: Demand, temp_dir: str) -> dict[str, Any]:
    """What ray.init needs to start Ray here; "local" joins nothing, whatever RAY_ADDRESS says."""
    return {
        "address": "local",
        "num_cpus": _slot_cpus(demand),
        "include_dashboard": False,
        "object_store_memory": _store_bytes(demand.slots),
        "_temp_dir": os.path.join(temp_dir, "r"),  # Ray opens its own directories to all; the parent is ours alone
    }


def _store_bytes(slots: int) -> int:
    """Size of the object store: what is more spills to the temp dir; Ray does without a /dev/shm that has less."""
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    return max(MIN_STORE_BYTES, min(slots * STORE_BYTES_A_SLOT, int(0.5 * free)))


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


def _describe(nodes: Sequence[Mapping[str, float]], temp_dir: str | None) -> ClusterInfo:
    import ray

    in_file = temp_dir is not None and not os.environ.get("RAY_AUTH_TOKEN")
    return ClusterInfo(
        address=connected_address(),
        ray_version=ray.__version__,
        nodes=len(nodes),
        cpus=sum(node.get("CPU", 0.0) for node in nodes),
        gpus=sum(node.get("GPU", 0.0) for node in nodes),
        owned=temp_dir is not None,
        temp_dir=temp_dir,
        token_path=os.environ.get("RAY_AUTH_TOKEN_PATH") if in_file else None,
    )
