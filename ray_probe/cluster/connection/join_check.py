"""Whether a Ray cluster can be joined, told within seconds and in one line; nothing of Ray is loaded in this process.

Left alone, Ray tries a closed port for minutes, calls a wrong token "Failed to connect" after 20 s, and looks 60 s
for a node on this machine. Its waits sit in C++ where nothing interrupts them, and some end the process. So joining
is rehearsed in a child process, which can be ended; it costs about 0.5 s.
"""

import errno
import json
import os
import platform
import pwd
import re
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from ray_probe.cluster.connection.addresses import is_loopback
from ray_probe.cluster.head.auth_token import token_mode, token_place
from ray_probe.cluster.head.crash import telling_line
from ray_probe.cluster.head.package_path import python_command
from ray_probe.cluster.head.ray_private import ADDRESS_NOTE, JOB_VARIABLE, MATCH_LEVEL_VARIABLE
from ray_probe.errors import ClusterError, ConfigError, NoClusterError, bad_value

TCP_S, ANSWER_S, JOIN_S, CHILD_S = 2, 3, 8, 60  # deadlines: TCP connect, first answer, joining, the child in all

# SIGALRM's default action ends the child whatever its threads do. On a Ray of which `cluster_versions` can ask nothing
# ray.init decides alone, under the same alarm, and only says less precisely why not.
_REHEARSAL = """
import json, os, signal, socket, sys
host, port, tcp_s, answer_s, join_s = sys.argv[1], *map(int, sys.argv[2:])
def tell(**facts):
    print(json.dumps(facts), flush=True)
signal.alarm(tcp_s)
try:
    socket.create_connection((host.strip("[]"), port), tcp_s).close()
except OSError as e:
    sys.exit(tell(unreachable=e.strerror or str(e), errno=e.errno))
signal.alarm(0)
tell(reached=True)
from ray_probe.cluster.head import ray_private
os.environ[ray_private.REQUEST_TIMEOUT_VARIABLE] = str(answer_s)
import ray
signal.alarm(answer_s)
try:
    versions = ray_private.cluster_versions(f"{host}:{port}", answer_s)
    if versions is not None:
        tell(ray=ray.__version__, versions=versions)
except getattr(ray.exceptions, "AuthenticationError", ()):
    sys.exit(tell(refused=True))
except Exception as e:
    sys.exit(tell(failed=str(e)))
signal.alarm(join_s)
try:
    ray.init(address=f"{host}:{port}", log_to_driver=False, logging_level="CRITICAL")
    tell(joined=True, nodes=[node["Resources"] for node in ray.nodes() if node["Alive"]])
    ray.shutdown()
except Exception as e:
    tell(failed=f"{e}: {e.__cause__ or ''}")
"""


def find_address(address: str) -> str:
    """The host:port behind `auto`, or `address` itself.

    `auto` is RAY_ADDRESS or the note that `ray start` leaves. Ray would also search the machine's processes, and so
    find private clusters that nobody meant to be joined.
    """
    found = address
    if address == "auto":
        note = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", ADDRESS_NOTE)
        found = os.environ.get("RAY_ADDRESS") or (note.read_text().strip() if note.is_file() else "auto")
        if found == "auto":
            remedy = f"there is neither RAY_ADDRESS nor {note}; give host:port, or null to start Ray here"
            raise ClusterError(bad_value("cluster.address", address, remedy))
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})", found)
    if not match or not 0 < int(match[2]) < 65536:
        raise ConfigError(bad_value("cluster.address", found, "use null, auto or host:port"))
    return found


def on_loopback_only(address: str) -> bool:
    """Whether what listens at host:port is on this machine and listens on loopback alone, as our own heads do."""
    host, port = address.rsplit(":", 1)
    if not is_loopback(host):
        return False
    places = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr]
    at_port = [place.ip for place in places if place.port == int(port)]
    return bool(at_port) and all(ip.removeprefix("::ffff:").startswith("127.") for ip in at_port)


def check_joinable(address: str) -> list[dict[str, float]]:
    """Rehearse joining the cluster at host:port with this process's environment; returns what its nodes have.

    Raises:
        NoClusterError: nothing listens there.
        ClusterError: it cannot be joined, and why: no answer, token missing or refused, other versions, no node here,
            another user's.
    """
    facts = _rehearse(address)
    if reason := _obstacle(facts):
        kind = NoClusterError if facts.get("errno") == errno.ECONNREFUSED else ClusterError
        raise kind(bad_value("cluster.address", address, reason))
    return list(facts["nodes"])


def version_mismatch(theirs: Mapping[str, str], ours: tuple[str, str], level: str = "patch") -> str | None:
    """Both (Ray, Python) versions when they differ; `level` is how far Python's is compared, patch or minor."""
    their_ray, their_python = theirs.get("ray_version", "?"), theirs.get("python_version", "?")
    parts = 2 if level == "minor" else 3
    if (their_ray, their_python.split(".")[:parts]) == (ours[0], ours[1].split(".")[:parts]):
        return None
    return f"the cluster has Ray {their_ray}, Python {their_python}; this process has Ray {ours[0]}, Python {ours[1]}"


def _rehearse(address: str) -> dict[str, Any]:
    """Join and leave in a child process: the facts it told, with its return code and last words."""
    host, port = address.rsplit(":", 1)
    command = python_command(_REHEARSAL, host, port, *(str(s) for s in (TCP_S, ANSWER_S, JOIN_S)))
    # A job's own runtime_env belongs to the real join, not to the rehearsal.
    env = {name: value for name, value in os.environ.items() if name != JOB_VARIABLE}
    try:
        child = subprocess.run(
            command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHILD_S
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {CHILD_S} s"}
    facts: dict[str, Any] = {"returncode": child.returncode, "last_words": telling_line(child.stderr)}
    for line in child.stdout.splitlines():
        if line.startswith("{"):
            facts.update(json.loads(line))
    return facts


def _obstacle(facts: Mapping[str, Any]) -> str | None:
    """What keeps us from joining, from the rehearsal's facts; None when it joined."""
    versions = facts.get("versions")
    level = os.environ.get(MATCH_LEVEL_VARIABLE, "patch")
    ours = (str(facts.get("ray")), platform.python_version())
    if versions and (mismatch := version_mismatch(versions, ours, level)):
        return f"{mismatch}; use the same on both"
    if facts.get("joined"):
        return None
    late = facts.get("returncode") == -signal.SIGALRM
    if "unreachable" in facts or (late and "reached" not in facts):
        why = facts.get("unreachable", f"no connection within {TCP_S} s")
        return f"no Ray cluster answers there ({why}); start one with `ray start --head`, or use null to start Ray here"
    if facts.get("refused"):
        sent = token_place() if token_mode() else "none, as RAY_AUTH_MODE is not token"
        return f"the cluster refused the token (sent: {sent}); set RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH to its file"
    if late and versions is None:
        return "something accepts connections there, but no Ray cluster answered in time; check host, port and token"
    if late:
        return f"the cluster answers, but joining it took more than {JOIN_S} s"
    failed = " ".join(str(facts.get("failed") or facts.get("last_words") or "no reason given").split())
    if "No node info found" in failed:
        return "the cluster answers, but none of its nodes runs on this machine; start ray_probe on one of its nodes"
    return f"Ray could not join the cluster: {failed[:300]}{_of_another_user(failed)}"


def _of_another_user(failed: str) -> str:
    """A remedy where Ray was denied a file of another user: the drivers of a cluster write among its own files."""
    path = re.search(r"/[^\s:'\"]+", failed)
    if "Permission denied" not in failed or path is None:
        return ""
    owner = next(uid for place in Path(path[0]).parents if (uid := _owner(place)) is not None)
    if owner == os.geteuid():
        return ""
    try:
        name = pwd.getpwuid(owner).pw_name
    except KeyError:
        name = str(owner)
    return f"; its files belong to the user {name}: run ray_probe as {name}, or start Ray as this user"


def _owner(path: Path) -> int | None:
    """The user id that a file belongs to; None where that cannot be seen."""
    try:
        return path.stat().st_uid
    except OSError:
        return None
