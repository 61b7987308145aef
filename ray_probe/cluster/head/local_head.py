"""Starts and ends a head, a private Ray in a process of its own.

`run`, `up` and `doctor` start Ray this way and no other. A head ends with the process that started it, unless it has
received the word `stay` (see `head_process`).
"""

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil

from ray_probe.cluster.head.crash import crash_dump, telling_line
from ray_probe.cluster.head.head_process import STAY
from ray_probe.cluster.head.package_path import python_command
from ray_probe.cluster.head.process_session import end_session, is_over, members, wait_for
from ray_probe.errors import ClusterError
from ray_probe.system import processes

START_S = 60.0
LEAVE_S = 1.0  # for a head that this process started to end itself; then it is killed
END_S = 20.0
POLL_S = 0.25
MAX_REASON_CHARS = 300
_CODE = "from ray_probe.cluster.head.head_process import main\nmain()\n"


@dataclass(frozen=True)
class Head:
    """A running head.

    Attributes:
        pid: its process, which leads the session of all of its processes.
        created: start of that process, see `system.processes.created`.
        address: host:port where Ray listens.
        token_path: file of the token; None where the user's own settings apply.
        temp_dir: directory of Ray's files.
    """

    pid: int
    created: float | None
    address: str
    token_path: str | None
    temp_dir: str


class StartedHead:
    """A head that this process started and that may still be starting.

    Args:
        process: of the head, with a pipe to its stdin.
        report: pipe that the head reports to.
        output: its stdout and stderr.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", report: IO[bytes], output: "HeadOutput") -> None:
        self._process = process
        self._report = report
        self._output = output
        self._head: Head | None = None
        self._ending = threading.Lock()

    def ready(self) -> Head:
        """Waits until Ray runs. Raises ClusterError with the reason if it does not."""
        if self._head is None:
            line = self._reported_line()
            if not line:
                raise ClusterError(f"cluster: Ray did not start on this machine ({self._why()}){self._output.see()}")
            pid = self._process.pid
            facts = json.loads(line)
            if "refused" in facts:
                raise ClusterError(facts["refused"])
            self._head = Head(pid, processes.created(pid), **facts)
        return self._head

    def is_gone(self) -> bool:
        """Returns whether the head's process has ended, and with it all of Ray."""
        return is_over(self._process.pid)

    def stay(self) -> None:
        """Lets the head outlive this process."""
        assert self._process.stdin is not None, "it was started with a pipe"
        self._process.stdin.write(STAY)
        self._process.stdin.close()

    def close(self) -> None:
        """Ends the head and its processes, and removes its files."""
        assert self._process.stdin is not None, "it was started with a pipe"
        with contextlib.suppress(OSError):  # the head has ended
            self._process.stdin.close()
        wait_for(self._process.pid, LEAVE_S)
        self.kill()

    def kill(self) -> None:
        """Kills the head and its processes, from any thread."""
        with self._ending:
            if self._process.returncode is None:
                end_session(self._process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(LEAVE_S)
        if self._head is not None:
            shutil.rmtree(self._head.temp_dir, ignore_errors=True)

    def _reported_line(self) -> bytes:
        """Returns the head's report; b"" when it ends first or misses the deadline."""
        deadline, line = time.monotonic() + START_S, b""
        while not line.endswith(b"\n") and time.monotonic() < deadline:
            if select.select([self._report], [], [], POLL_S)[0]:
                part = os.read(self._report.fileno(), 65536)
                if not part:
                    return b""
                line += part
        return line

    def _why(self) -> str:
        wait_for(self._process.pid, LEAVE_S)
        return self._output.reason() if self.is_gone() else f"no answer after {START_S:g} s"


@dataclass(frozen=True)
class HeadOutput:
    """What a head writes to stdout and stderr.

    Attributes:
        file: that receives the output.
        began: offset in the file where this head's output begins, bytes.
        log: path of the file; None for a temporary file.
    """

    file: IO[bytes]
    began: int
    log: Path | None

    def reason(self) -> str:
        """Returns the last line, or of a crash dump the line that says why."""
        size = os.fstat(self.file.fileno()).st_size - self.began
        words = os.pread(self.file.fileno(), size, self.began).decode(errors="replace").strip()
        why = telling_line(words) if crash_dump(words.splitlines()) else words.rpartition("\n")[2]
        return (why or "no output")[:MAX_REASON_CHARS]

    def see(self) -> str:
        """Returns the end of a message that names the log, or ""."""
        return "" if self.log is None else f"; see {self.log}"


def start(options: Mapping[str, Any], log: Path | None = None) -> StartedHead:
    """Starts a head; returns at once.

    Args:
        options: of `ray.init`, plain JSON types.
        log: file (0600) that its output is appended to; None: a temporary file.
    """
    file = _output_file(log)
    began = os.fstat(file.fileno()).st_size
    report, write = os.pipe()
    command = python_command(_CODE, str(write))
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=file, stderr=file, pass_fds=(write,), start_new_session=True,
            cwd=None if log is None else "/",
        )  # fmt: skip
    finally:
        os.close(write)
    assert process.stdin is not None, "it was started with a pipe"
    with contextlib.suppress(BrokenPipeError):  # the head has ended; `ready` raises the reason
        process.stdin.write(json.dumps(dict(options)).encode() + b"\n")
        process.stdin.flush()
    return StartedHead(process, os.fdopen(report, "rb"), HeadOutput(file, began, log))


def end(pid: int, created: float | None) -> bool:
    """Ends a head of another process; returns whether it was running.

    Raises ClusterError if some of its processes stay.
    """
    if is_over(pid) or (created is not None and processes.created(pid) != created):
        return False
    family = [psutil.Process(member) for member in members(pid) if member != pid]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    if not wait_for(pid, END_S):
        end_session(pid)
    _, left = psutil.wait_procs(family, END_S)
    if left:
        raise ClusterError(f"the head's processes {[one.pid for one in left]} do not end; end them by hand")
    return True


def _output_file(log: Path | None) -> IO[bytes]:
    if log is None:
        return tempfile.TemporaryFile()
    return open(os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab")
