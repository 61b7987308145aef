"""Whether a Ray cluster can be joined, found within seconds and said in one line.

Ray itself tries a closed port for minutes, calls a wrong token "Failed to connect" after 20 s, and looks 60 s for a
node on this machine. Its waits sit in C++ where nothing interrupts them, and some end the process. So a child process
rehearses the join, which takes about 0.5 s; this process does not load Ray for that.
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

from ray_probe.cluster.connection.join_rehearsal import JOIN_S, TCP_S
from ray_probe.cluster.head.auth_token import token_mode, token_place
from ray_probe.cluster.head.crash import telling_line
from ray_probe.cluster.head.package_path import python_command
from ray_probe.cluster.head.ray_private import JOB_VARIABLE, MATCH_LEVEL_VARIABLE
from ray_probe.errors import ClusterError, NoClusterError, bad_value

CHILD_S = 60
_CODE = "from ray_probe.cluster.connection.join_rehearsal import main\nmain()\n"


def check_joinable(address: str) -> list[dict[str, float]]:
    """Rehearses joining the cluster at host:port in this process's environment.

    Returns:
        The resources of each live node.

    Raises:
        NoClusterError: nothing listens there.
        ClusterError: it cannot be joined: no answer, token missing or refused, other versions, no node here, or files
            of another user.
    """
    facts = rehearse(address)
    if reason := obstacle(facts):
        kind = NoClusterError if facts.get("errno") == errno.ECONNREFUSED else ClusterError
        raise kind(bad_value("cluster.address", address, reason))
    return list(facts["nodes"])


def version_mismatch(theirs: Mapping[str, str], ours: tuple[str, str], level: str = "patch") -> str | None:
    """Returns both versions of Ray and Python when they differ, else None.

    Args:
        theirs: `ray_version` and `python_version` of the cluster.
        ours: the same of this process.
        level: part of Python's version that must agree, patch or minor.
    """
    their_ray, their_python = theirs.get("ray_version", "?"), theirs.get("python_version", "?")
    parts = 2 if level == "minor" else 3
    if (their_ray, their_python.split(".")[:parts]) == (ours[0], ours[1].split(".")[:parts]):
        return None
    return f"the cluster has Ray {their_ray}, Python {their_python}; this process has Ray {ours[0]}, Python {ours[1]}"


def rehearse(address: str) -> dict[str, Any]:
    """Returns the facts that `join_rehearsal` reports, its exit code and last words."""
    # The runtime_env of a submitted job belongs to the real join.
    env = {name: value for name, value in os.environ.items() if name != JOB_VARIABLE}
    try:
        child = subprocess.run(
            python_command(_CODE, address), env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=CHILD_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer within {CHILD_S} s"}
    facts: dict[str, Any] = {"returncode": child.returncode, "last_words": telling_line(child.stderr)}
    for line in child.stdout.splitlines():
        if line.startswith("{"):
            facts.update(json.loads(line))
    return facts


def obstacle(facts: Mapping[str, Any]) -> str | None:
    """Returns what prevents joining, with a remedy; None if the rehearsal joined."""
    versions = facts.get("versions")
    ours = (str(facts.get("ray")), platform.python_version())
    level = os.environ.get(MATCH_LEVEL_VARIABLE, "patch")
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
    """Returns a remedy where Ray was denied a file of another user, else ""."""
    # A driver writes among the files of its cluster.
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
    try:
        return path.stat().st_uid
    except OSError:
        return None
