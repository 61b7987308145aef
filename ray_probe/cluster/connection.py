"""Reaching a Ray cluster, or starting one here: every wait is bounded, every refusal is one line.

Left alone, Ray tries a closed port for minutes, calls a wrong token "Failed to connect" after 20 s, looks 60 s for a
node on this machine, and joins whatever cluster it finds. Its waits sit in C++ where nothing interrupts them, so
joining is rehearsed in a child process, which can be ended; that costs about 0.5 s.
"""

import contextlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_probe.errors import ClusterError, ConfigError, bad_value

TCP_S, ANSWER_S, JOIN_S, CHILD_S = 2, 4, 8, 60  # deadlines: TCP connect, first answer, joining, the child in all
ROOM_S = 5.0  # nodes of a cluster that has just been started register one after the other
OBJECT_STORE_BYTES = 256 * 2**20  # more spills to the temp dir, and so does a /dev/shm smaller than this
MAX_TMP_CHARS = 24  # Ray appends up to 83 characters, and a socket's path ends at 107

# One token for every cluster that this process starts: Ray caches it in the process, so a second cluster would
# refuse us should `_reload_auth` lose its way to drop that cache.
_TOKEN = secrets.token_hex(32)

# SIGALRM's default action ends the child whatever its threads do. The internals are GcsClient (the one call that
# tells a refused token from silence, in 10 ms) and the key under which a cluster keeps its versions; on a Ray
# without them, ray.init under the same alarm still decides, and only says less precisely why not.
_REHEARSAL = """
import json, os, signal, socket, sys
host, port, tcp_s, answer_s, join_s = sys.argv[1], *map(int, sys.argv[2:])
def tell(**facts):
    print(json.dumps(facts), flush=True)
signal.alarm(tcp_s)
try:
    socket.create_connection((host.strip("[]"), port)).close()
except OSError as e:
    sys.exit(tell(unreachable=e.strerror or str(e)))
signal.alarm(0)
tell(reached=True)
os.environ["RAY_gcs_server_request_timeout_seconds"] = str(answer_s)
import ray
signal.alarm(answer_s)
try:
    from ray._raylet import GcsClient
    found = GcsClient(address=f"{host}:{port}").internal_kv_get(b"CLUSTER_METADATA", b"cluster", timeout=answer_s)
    tell(versions=json.loads(found) if found else {})
except getattr(ray.exceptions, "AuthenticationError", ()):
    sys.exit(tell(refused=True))
except (ImportError, AttributeError, TypeError):
    pass
except Exception as e:
    sys.exit(tell(failed=str(e)))
signal.alarm(join_s)
try:
    ray.init(address=f"{host}:{port}", log_to_driver=False, logging_level="CRITICAL")
    tell(joined=True)
    ray.shutdown()
except Exception as e:
    tell(failed=f"{e}: {e.__cause__ or ''}")
"""


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
    """The connected cluster; `temp_dir` and `token_path` are None unless it was started here (with our token)."""

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
    demand: Demand,
    *,
    runtime_env: dict[str, Any] | None = None,
    token_path: str | None = None,
    log: Callable[[str], None],
) -> Iterator[ClusterInfo]:
    """Connect this process to the cluster at `address` (None: start Ray here), and disconnect at the end.

    A cluster started here ends with the block, its processes and temp dir too, also on exceptions and Ctrl-C.
    `token_path` names the token of a cluster that another ray_probe started (its `ClusterInfo.token_path`).

    Raises:
        ClusterError: unreachable, token refused, other versions, no node here, or too small; within seconds.
        ConfigError: the address is not null, auto or host:port.
    """
    with contextlib.ExitStack() as stack:
        temp_dir, how = None, {}
        if address is None:
            if warning := slots_warning(demand, os.cpu_count() or 1):
                log(warning)
            temp_dir = stack.enter_context(_private_dir())
            stack.enter_context(_environment(_env_to_start(temp_dir)))
            cpus = max(1, math.ceil(demand.slots * demand.cpus_per_actor))
            how = {"address": "local", "num_cpus": cpus, "include_dashboard": False, "_temp_dir": f"{temp_dir}/r"}
            how["object_store_memory"] = OBJECT_STORE_BYTES
        else:
            how["address"] = find_address(address)
            stack.enter_context(_environment(_env_to_join(address, token_path)))
            _rehearse(how["address"])
        info = stack.enter_context(_session(how, namespace, runtime_env, temp_dir))
        _wait_for_room(demand, 1.0 if info.owned else ROOM_S)
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


def version_mismatch(theirs: Mapping[str, str], ours: tuple[str, str], level: str = "patch") -> str | None:
    """Both (Ray, Python) versions when they differ; `level` is how far Python's is compared, patch or minor."""
    their_ray, their_python = theirs.get("ray_version", "?"), theirs.get("python_version", "?")
    parts = 2 if level == "minor" else 3
    if (their_ray, their_python.split(".")[:parts]) == (ours[0], ours[1].split(".")[:parts]):
        return None
    return f"the cluster has Ray {their_ray} and Python {their_python}, this process Ray {ours[0]} and Python {ours[1]}"


def shortfall(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Why the actors cannot all be placed on nodes with these resources, in one line, or None when they can."""
    one = demand.per_actor()
    for name, amount in one.items():
        total = sum(node.get(name, 0.0) for node in nodes)
        if demand.actors * amount > total + 1e-9:
            field = {"CPU": "cpus_per_actor", "GPU": "gpus_per_actor"}.get(name, "resources")
            have = f"asked {demand.actors} x {amount:g} {name}, the cluster has {total:g}"
            return f"cluster.{field}: {have}; ask for fewer actors or less for each, or add nodes"
    room = sum(min((int(node.get(n, 0.0) / a + 1e-9) for n, a in one.items()), default=demand.actors) for node in nodes)
    if room >= demand.actors:
        return None
    each = " + ".join(f"{amount:g} {name}" for name, amount in one.items())
    return f"cluster.actors: asked {demand.actors} x ({each}), each on one node; the {len(nodes)} nodes have room for {room}"


def find_address(address: str) -> str:
    """The host:port behind `auto`, or `address` itself.

    `auto` is RAY_ADDRESS or the note that `ray start` leaves. Ray would also search the machine's processes, and so
    find private clusters that nobody meant to be joined.
    """
    found = address
    if address == "auto":
        note = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", "ray_current_cluster")
        found = os.environ.get("RAY_ADDRESS") or (note.read_text().strip() if note.is_file() else "auto")
        if found == "auto":
            remedy = f"there is neither RAY_ADDRESS nor {note}; give host:port, or null to start Ray here"
            raise ClusterError(bad_value("cluster.address", address, remedy))
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})", found)
    if not match or not 0 < int(match[2]) < 65536:
        raise ConfigError(bad_value("cluster.address", found, "use null, auto or host:port"))
    return found


def _rehearse(address: str) -> None:
    """Join and leave in a child process; raise what kept it from joining."""
    ...
