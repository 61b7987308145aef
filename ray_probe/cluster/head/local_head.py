"""Starts a private Ray on this machine in a process of its own, the head, and ends it with all that it started.

`run`, `up` and `doctor` start Ray this way. A head ends with the process that started it, whatever ends that process,
unless it has received the word `stay` (see `head_process`).
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
LEAVE_S = 1.0  # a head that this process started is killed when it takes longer to end itself
END_S = 20.0
POLL_S = 0.25
MAX_WORDS = 300
_CODE = "from ray_probe.cluster.head.head_process import main\nmain()\n"


@dataclass(frozen=True)
class Head:
    """A head that runs.

    Attributes:
        pid: its process, which leads the session of all of its processes.
        created: when that began, see `registry.created`.
        address: host:port where Ray listens.
        token_path: file of the token; None where it lies elsewhere, or Ray asks for none.
        temp_dir: directory of Ray's files.
    """

    pid: int
    created: float | None
    address: str
    token_path: str | None
    temp_dir: str


class StartedHead:
    """A head that this process has started, there already or on its way.

    Args:
        process: of the head, with a pipe to its stdin.
        report: the pipe that it reports to.
        words: what it writes to stdout and stderr.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", report: IO[bytes], words: "Words") -> None:
        self._process = process
        self._report = report
        self._words = words
        self._head: Head | None = None
        self._ending = threading.Lock()

    def ready(self) -> Head:
        """Wait until Ray is there.

        Raises:
            ClusterError: Ray does not start in time; with the reason.
        """
        if self._head is None:
            line = self._reported_line()
            if not line:
                raise ClusterError(f"cluster: Ray did not start on this machine ({self._why()}){self._words.see()}")
            pid = self._process.pid
            facts = json.loads(line)
            if "refused" in facts:
                raise ClusterError(facts["refused"])
            self._head = Head(pid, processes.created(pid), **facts)
        return self._head

    def is_gone(self) -> bool:
        """Whether the head's process has ended, and with it all of Ray."""
        return is_over(self._process.pid)

    def stay(self) -> None:
        """Let the head outlive this process."""
        assert self._process.stdin is not None, "it was started with a pipe"
        self._process.stdin.write(STAY)
        self._process.stdin.close()

    def close(self) -> None:
        """End the head with every process that it started, and remove its files; it has `LEAVE_S` to do so itself."""
        assert self._process.stdin is not None, "it was started with a pipe"
        with contextlib.suppress(OSError):  # it is gone
            self._process.stdin.close()
        wait_for(self._process.pid, LEAVE_S)
        self.kill()

    def kill(self) -> None:
        """End the head and its processes at once; safe from any thread."""
        with self._ending:
            if self._process.returncode is None:
                end_session(self._process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(LEAVE_S)
        if self._head is not None:
            shutil.rmtree(self._head.temp_dir, ignore_errors=True)

    def _reported_line(self) -> bytes:
        """The line that the head reports; empty when it ends without, or takes too long."""
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
        return self._words.last_line() if self.is_gone() else f"it is not there after {START_S:g} s"


@dataclass(frozen=True)
class Words:
    """What a head writes.

    Attributes:
        file: where to.
        began: where in it this head's words begin, bytes.
        log: its path, None for a file that has none.
    """

    file: IO[bytes]
    began: int
    log: Path | None

    def last_line(self) -> str:
        """The last line that is not blank; of a crash dump the line that says why."""
        size = os.fstat(self.file.fileno()).st_size - self.began
        words = os.pread(self.file.fileno(), size, self.began).decode(errors="replace").strip()
        why = telling_line(words) if crash_dump(words.splitlines()) else words.rpartition("\n")[2]
        return (why or "no word")[:MAX_WORDS]

    def see(self) -> str:
        """Where to read on, for the end of a message."""
        return "" if self.log is None else f"; see {self.log}"


def start(options: Mapping[str, Any], log: Path | None = None) -> StartedHead:
    """Start a head; returns at once.

    Args:
        options: of `ray.init`, plain JSON types.
        log: file that its words are added to (0600), for a head that stays; None: they are kept while it starts.
    """
    words = _words_file(log)
    began = os.fstat(words.fileno()).st_size
    report, write = os.pipe()
    command = python_command(_CODE, str(write))
    try:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=words, stderr=words, pass_fds=(write,), start_new_session=True,
            cwd=None if log is None else "/",
        )  # fmt: skip
    finally:
        os.close(write)
    assert process.stdin is not None, "it was started with a pipe"
    with contextlib.suppress(BrokenPipeError):  # `ready` tells why
        process.stdin.write(json.dumps(dict(options)).encode() + b"\n")
        process.stdin.flush()
    return StartedHead(process, os.fdopen(report, "rb"), Words(words, began, log))


def end(pid: int, created: float | None) -> bool:
    """End a head that another process has started, and all of its processes; returns whether it was there.

    Raises ClusterError if some of them stay.
    """
    if created is not None and processes.created(pid) != created:
        return False
    if is_over(pid):
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


def _words_file(log: Path | None) -> IO[bytes]:
    if log is None:
        return tempfile.TemporaryFile()
    return open(os.open(log, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600), "ab")
