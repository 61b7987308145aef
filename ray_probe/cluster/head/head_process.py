"""The process of a head, which starts a private Ray on loopback and ends it.

It reads the options of `ray.init` as one line of JSON from stdin, and writes one line of JSON to a pipe once Ray runs.
The starter holds the other end of stdin: Ray ends when that closes, unless the line `stay` came before. After `stay`
SIGTERM ends Ray.

The process leads a session with every process of Ray in it, so that no signal to a run's terminal or process group
reaches Ray. Batch systems send SIGTERM to each process of a job: Ray's processes start with SIGTERM blocked, so that a
run can end in order. SIGKILL ends them and loses nothing, as committed rounds are on disk.
"""

import json
import logging
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, NoReturn

import psutil

from ray_probe.cluster.head.auth_token import require_token, token_mode
from ray_probe.cluster.head.environment import env_to_start, environment, on_loopback, private_dir
from ray_probe.cluster.head.process_session import end_session, is_over
from ray_probe.cluster.head.ray_private import DAEMONS, JOB_VARIABLE, TEMP_DIR_OPTION
from ray_probe.errors import ClusterError
from ray_probe.system.failpoints import fail_at

NAMESPACE = "ray_probe_head"
LOOK_EVERY_S = 0.25
STAY = b"stay\n"
STAY_S = 2.0
"""Time to read `stay` of a starter that has ended."""
BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STARTER_GONE = "the process that started the head is gone"

_is_to_stay = threading.Event()


def main() -> None:
    """Entry point; the argument is the file descriptor of the pipe to report to."""
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    report, starter = int(sys.argv[1]), os.getppid()
    options = json.loads(sys.stdin.buffer.readline() or "null")
    if options is None:
        return  # the starter closed the pipe before it sent the options
    with private_dir() as temp_dir:
        threading.Thread(target=_end_with_its_starter, args=(temp_dir,), daemon=True).start()
        with environment({**env_to_start(temp_dir), JOB_VARIABLE: None}), on_loopback():
            facts = _started(options, temp_dir)
            with open(report, "w", encoding="utf-8") as pipe:
                pipe.write(json.dumps(facts) + "\n")
            _watch(temp_dir, starter)


def _started(options: Mapping[str, Any], temp_dir: str) -> dict[str, Any]:
    """Starts Ray; returns the facts to report, or `refused` with the reason."""
    try:
        require_token(None)
        return _start_ray(options, temp_dir)
    except ClusterError as error:
        return {"refused": str(error)}
    except Exception as error:
        _end(temp_dir, " ".join(f"{type(error).__name__}: {error}".split()))


def _start_ray(options: Mapping[str, Any], temp_dir: str) -> dict[str, Any]:
    # Called in the main thread: the kernel kills Ray's daemons when the thread that started them ends.
    import ray

    fail_at("head_before_ray")
    ray.init(
        address="local", namespace=NAMESPACE, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        **{TEMP_DIR_OPTION: os.path.join(temp_dir, "r")},  # readable for all; the parent is 0700
        **options,
    )  # fmt: skip
    in_file = token_mode() and not os.environ.get("RAY_AUTH_TOKEN")
    return {
        "address": ray.get_runtime_context().gcs_address,
        "token_path": os.environ.get("RAY_AUTH_TOKEN_PATH") if in_file else None,
        "temp_dir": temp_dir,
    }


def _watch(temp_dir: str, starter: int) -> NoReturn:
    """Waits for SIGTERM, or for the end of the starter or of a daemon that Ray needs."""
    daemons = {child.pid: child.name() for child in psutil.Process().children() if child.name() in DAEMONS}
    while True:
        time.sleep(LOOK_EVERY_S)
        if _is_to_stay.is_set() and signal.SIGTERM in signal.sigpending():
            _end(temp_dir, "the head has ended")
        if os.getppid() != starter and not _is_to_stay.wait(STAY_S):  # a fork of the starter may hold the pipe open
            _end(temp_dir, STARTER_GONE)
        for pid, name in daemons.items():
            if is_over(pid):
                _end(temp_dir, f"the head has ended, as Ray's process {name} is gone")


def _end_with_its_starter(temp_dir: str) -> None:
    if sys.stdin.buffer.readline() == STAY:
        _is_to_stay.set()
    else:
        _end(temp_dir, STARTER_GONE)


def _end(temp_dir: str, words: str) -> NoReturn:
    """Ends Ray and this process, from any thread."""
    end_session(os.getpid())
    shutil.rmtree(temp_dir, ignore_errors=True)
    print(words, flush=True)
    os._exit(0)
