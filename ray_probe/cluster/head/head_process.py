"""The process of a head: starts a private Ray on loopback, reports where it is, and ends it.

It reads one line of JSON from stdin, the options of `ray.init`, and reports a line of JSON to a pipe once Ray is there.
The process that started it holds the other end of stdin: when that closes, whatever the reason, all of Ray ends, unless
the line `stay` came before. SIGTERM ends all of Ray once it is to stay.

It leads a session of its own, with every process of Ray in it, so no signal to the terminal or the process group of a
run reaches Ray. Batch systems send SIGTERM to each process of a job: Ray's processes are started with SIGTERM blocked,
so that a run can end in order then. SIGKILL always ends them, which loses nothing: what counts of a run is on disk.
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

from ray_probe.cluster.head.environment import (
    env_to_start,
    environment,
    on_loopback,
    private_dir,
    require_token,
    token_mode,
)
from ray_probe.cluster.head.process_session import end_session, is_over
from ray_probe.cluster.head.ray_private import DAEMONS, JOB_VARIABLE, TEMP_DIR_OPTION
from ray_probe.errors import ClusterError
from ray_probe.system.failpoints import fail_at

NAMESPACE = "ray_probe_head"
LOOK_EVERY_S = 0.25
STAY = b"stay\n"
STAY_S = 2.0
"""For the word of a starter that has ended to be read."""
BLOCKED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def main() -> None:
    """Entry point; the argument is the number of the pipe that is reported to."""
    signal.pthread_sigmask(signal.SIG_BLOCK, BLOCKED)
    report, starter = int(sys.argv[1]), os.getppid()
    options = json.loads(sys.stdin.buffer.readline() or "null")
    if options is None:
        return  # it was given up before it began
    with private_dir() as temp_dir:
        threading.Thread(target=_end_with_its_starter, args=(temp_dir,), daemon=True).start()
        with environment({**env_to_start(temp_dir), JOB_VARIABLE: None}), on_loopback():
            facts = _started(options, temp_dir)
            with open(report, "w", encoding="utf-8") as pipe:
                pipe.write(json.dumps(facts) + "\n")
            _watch(temp_dir, starter)


def _started(options: Mapping[str, Any], temp_dir: str) -> dict[str, Any]:
    """Where Ray is, or why this machine's settings refuse it."""
    try:
        require_token(None)
        return _start_ray(options, temp_dir)
    except ClusterError as error:
        return {"refused": str(error)}
    except Exception as error:
        _end(temp_dir, " ".join(f"{type(error).__name__}: {error}".split()))


def _start_ray(options: Mapping[str, Any], temp_dir: str) -> dict[str, Any]:
    """Start Ray from this thread: its daemons are killed by the kernel when the thread that started them ends."""
    import ray

    fail_at("head_before_ray")
    ray.init(
        address="local", namespace=NAMESPACE, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR,
        **{TEMP_DIR_OPTION: os.path.join(temp_dir, "r")},  # Ray opens its own directories to all; the parent is ours
        **options,
    )  # fmt: skip
    in_file = token_mode() and not os.environ.get("RAY_AUTH_TOKEN")
    return {
        "address": ray.get_runtime_context().gcs_address,
        "token_path": os.environ.get("RAY_AUTH_TOKEN_PATH") if in_file else None,
        "temp_dir": temp_dir,
    }


def _watch(temp_dir: str, starter: int) -> NoReturn:
    """Wait for SIGTERM, or for the end of the starter or of a daemon without which Ray cannot go on."""
    daemons = {child.pid: child.name() for child in psutil.Process().children() if child.name() in DAEMONS}
    while True:
        time.sleep(LOOK_EVERY_S)
        if _is_to_stay.is_set() and signal.SIGTERM in signal.sigpending():
            _end(temp_dir, "the head has ended")
        if os.getppid() != starter and not _is_to_stay.wait(STAY_S):  # a child that it forked may hold the pipe open
            _end(temp_dir, "the process that started the head is gone")
        for pid, name in daemons.items():
            if is_over(pid):
                _end(temp_dir, f"the head has ended, as Ray's process {name} is gone")


_is_to_stay = threading.Event()


def _end_with_its_starter(temp_dir: str) -> None:
    """End when the starter closes the pipe, or is gone, before it has sent `stay`."""
    if sys.stdin.buffer.readline() == STAY:
        _is_to_stay.set()
    else:
        _end(temp_dir, "the process that started the head is gone")


def _end(temp_dir: str, words: str) -> NoReturn:
    """End Ray and this process, from any thread, whatever the others wait for."""
    end_session(os.getpid())
    shutil.rmtree(temp_dir, ignore_errors=True)
    print(words, flush=True)
    os._exit(0)
