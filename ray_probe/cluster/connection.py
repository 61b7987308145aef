"""Connecting to a Ray cluster, or starting one here that ends with us and leaves nothing behind.

A Ray that is started here is private: it listens on loopback, has a temp dir of mode 0700 with a token of its own in
it, and nothing is written to the home directory (a bare ray.init leaves a world-readable token there). Ctrl-C needs
no care: Ray blocks SIGINT in the processes that it starts and puts workers in process groups of their own, so they
outlive the driver's KeyboardInterrupt and are shut down in order.
"""

import contextlib
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from ray_probe.cluster.environment import (
    env_to_join,
    env_to_start,
    environment,
    on_loopback,
    private_dir,
    require_token,
)
from ray_probe.cluster.reach import check_joinable, find_address, on_loopback_only
from ray_probe.errors import ClusterError, bad_value
from ray_probe.layout import BUCKET_NUMBERS

ROOM_S = 3.0  # nodes of a cluster that has just been started register one after the other
EXIT_S = 5.0  # for processes to follow ray.shutdown (measured: none was left when it returned)
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
            temp_dir = stack.enter_context(private_dir())
            stack.enter_context(environment(env_to_start(temp_dir)))
            require_token(address)
            stack.enter_context(on_loopback())
            where = _local_options(demand, temp_dir)
        else:
            found = find_address(address)
            if loopback or on_loopback_only(found):
                stack.enter_context(on_loopback())
            stack.enter_context(environment(env_to_join(address, token_path)))
            require_token(address)
            check_joinable(found)
            where = {"address": found}
        stack.enter_context(_session({**where, "namespace": namespace, "runtime_env": runtime_env or None}, temp_dir))
        nodes = _alive_nodes() if demand is None else _wait_for_room(demand, ROOM_S if temp_dir is None else 1.0)
        info = _describe(nodes, temp_dir)
        log(
            f"cluster: {'started' if info.owned else 'joined'} Ray {info.ray_version} at {info.address}: "
            f"nodes {info.nodes}, CPUs {info.cpus:g}, GPUs {info.gpus:g}"
        )
        yield info


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


def _local_options(demand: Demand, temp_dir: str) -> dict[str, Any]:
    """What ray.init needs to start Ray here; "local" joins nothing, whatever RAY_ADDRESS says."""
    return {
        "address": "local",
        "num_cpus": max(1, math.ceil(demand.slots * demand.cpus_per_actor)),
        "include_dashboard": False,
        "object_store_memory": _store_bytes(demand.slots),
        "_temp_dir": os.path.join(temp_dir, "r"),  # Ray opens its own directories to all; the parent is ours alone
    }


def _store_bytes(slots: int) -> int:
    """Size of the object store: what is more spills to the temp dir; Ray does without a /dev/shm that has less."""
    free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    return max(MIN_STORE_BYTES, min(slots * STORE_BYTES_A_SLOT, int(0.5 * free)))


def _refuse_second_connection(address: str | None) -> None:
    """A process has one Ray connection; nothing may be changed under one that is open."""
    ray: Any = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        remedy = "this process is connected to a Ray cluster already; call ray.shutdown() first"
        raise ClusterError(bad_value("cluster.address", address, remedy))


@contextlib.contextmanager
def _session(options: Mapping[str, Any], temp_dir: str | None) -> Iterator[None]:
    """ray.init and ray.shutdown around the block, with what Ray leaves behind put right."""
    with _signals_as_before() as restore:
        try:
            _init(options)
            restore()
            yield
        finally:
            with _without_ctrl_c():
                _leave(temp_dir)


def _init(options: Mapping[str, Any]) -> None:
    import ray

    try:
        ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ClusterError(f"cluster: ray.init at {options['address']} failed: {reason}") from error


@contextlib.contextmanager
def _signals_as_before() -> Iterator[Callable[[], None]]:
    """Put SIGTERM's handler back after the block, and, where the caller has one of its own, once Ray is there.

    Ray makes it a SystemExit, which cleans up, or, in a process that only joins, a crash report.
    """
    before = signal.getsignal(signal.SIGTERM)
    main_thread = threading.current_thread() is threading.main_thread()

    def restore() -> None:
        if callable(before) and main_thread:
            signal.signal(signal.SIGTERM, before)

    try:
        yield restore
    finally:
        if before is not None and main_thread:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _without_ctrl_c() -> Iterator[None]:
    """Keep a second Ctrl-C from cutting the clean-up short; it is bounded and takes about 1.5 s."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(temp_dir: str | None) -> None:
    """Disconnect; end what a start or a shutdown that was cut short has left running."""
    import ray

    ours = []
    if temp_dir:
        for child in psutil.Process().children():
            with contextlib.suppress(psutil.Error):
                if any(temp_dir in word for word in child.cmdline()):
                    ours += [child, *child.children(recursive=True)]
    started = ray.is_initialized()
    ray.shutdown()
    _, left = psutil.wait_procs(ours, timeout=EXIT_S if started else 0)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=EXIT_S)


def _alive_nodes() -> list[dict[str, float]]:
    import ray

    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _wait_for_room(demand: Demand, seconds: float) -> list[dict[str, float]]:
    """The resources of the nodes, once they hold the actors that were asked for, or else a ClusterError."""
    deadline = time.monotonic() + seconds
    while (problem := shortfall(demand, nodes := _alive_nodes())) and time.monotonic() < deadline:
        time.sleep(0.1)
    if problem:
        raise ClusterError(problem)
    return nodes


def _describe(nodes: Sequence[Mapping[str, float]], temp_dir: str | None) -> ClusterInfo:
    import ray

    in_file = temp_dir is not None and not os.environ.get("RAY_AUTH_TOKEN")
    return ClusterInfo(
        address=ray.get_runtime_context().gcs_address,
        ray_version=ray.__version__,
        nodes=len(nodes),
        cpus=sum(node.get("CPU", 0.0) for node in nodes),
        gpus=sum(node.get("GPU", 0.0) for node in nodes),
        owned=temp_dir is not None,
        temp_dir=temp_dir,
        token_path=os.environ.get("RAY_AUTH_TOKEN_PATH") if in_file else None,
    )
