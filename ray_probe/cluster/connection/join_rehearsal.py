"""Joins a Ray cluster and leaves it, in a child process of `join_check`.

Writes JSON objects to stdout, one a line, as each fact is known. SIGALRM ends the process at the deadline of each step,
whatever its threads wait for.
"""

import json
import os
import signal
import socket
import sys
from typing import Any

TCP_S, ANSWER_S, JOIN_S = 2, 3, 8
"""Deadlines: TCP connection, first answer of the head, joining."""


def main() -> None:
    """Entry point; the argument is host:port."""
    address = sys.argv[1]
    host, port = address.rsplit(":", 1)
    signal.alarm(TCP_S)
    try:
        socket.create_connection((host.strip("[]"), int(port)), TCP_S).close()
    except OSError as error:
        _report(unreachable=error.strerror or str(error), errno=error.errno)
        return
    signal.alarm(0)
    _report(reached=True)
    from ray_probe.cluster.head.ray_private import REQUEST_TIMEOUT_VARIABLE, cluster_versions

    os.environ[REQUEST_TIMEOUT_VARIABLE] = str(ANSWER_S)
    import ray

    signal.alarm(ANSWER_S)
    try:
        versions = cluster_versions(address, ANSWER_S)
    except ray.exceptions.AuthenticationError:
        _report(refused=True)
        return
    except Exception as error:
        _report(failed=str(error))
        return
    if versions is not None:  # else `ray.init` finds what is wrong, with a less precise message
        _report(ray=ray.__version__, versions=versions)
    signal.alarm(JOIN_S)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="CRITICAL")
        _report(joined=True, nodes=[node["Resources"] for node in ray.nodes() if node["Alive"]])
        ray.shutdown()
    except Exception as error:
        _report(failed=f"{error}: {error.__cause__ or ''}")


def _report(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)
