"""The Ray that a service owns on this machine: a process of its own that outlives the command which started it.

A Ray that `ray.init` starts ends with the process that started it. So that process is this one: it starts a private
Ray on loopback, says where, and waits for SIGTERM. When it is killed, Ray's own reaper ends the rest.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from ray_probe.cluster.crash import crash_dump, telling_line
from ray_probe.errors import ClusterError
from ray_probe.service import registry

START_S = 60.0
END_S = 20.0
STAY = b"stay\n"


@dataclass(frozen=True)
class Head:
    """A head that runs: its process, where Ray listens, the token's file, and Ray's temp dir."""

    pid: int
    created: float | None
    address: str
    token_path: str | None
    temp_dir: str


@dataclass(frozen=True)
class Started:
    """A head that ends with this process, whatever ends it, until it is told to stay."""

    head: Head
    process: "subprocess.Popen[bytes]"

    def stay(self) -> None:
        """Have it outlive this process."""
        assert self.process.stdin is not None, "it was started with a pipe"
        self.process.stdin.write(STAY)
        self.process.stdin.close()


def start(slots: int, cpus_per_actor: float, gpus: float, directory: Path) -> Started:
    """Start a head with room for so many actors; its words go to `head.log` in the directory.

    Raises ClusterError with its last words when it does not come up.
    """
    log = directory / "head.log"
    ready = directory / f".head-{os.getpid()}.json"
    command = [
        sys.executable,
        "-P",
        "-m",
        "ray_probe.cluster.head",
        str(ready),
        str(slots),
        str(cpus_per_actor),
        str(gpus),
    ]
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    began = log.stat().st_size
    with open(descriptor, "ab") as words:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=words, stderr=words, start_new_session=True, cwd="/"
        )
    try:
        return Started(_wait_until_ready(process, ready, log, began), process)
    except BaseException:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        raise
    finally:
        ready.unlink(missing_ok=True)


def end(pid: int, created: float | None) -> bool:
    """End a head and everything that it started; returns whether it was there. Raises ClusterError if it stays."""
    try:
        process = psutil.Process(pid)
        if created is not None and registry.created(pid) != created:
            return False
        children = process.children(recursive=True)
        process.terminate()
        process.wait(END_S)
    except psutil.NoSuchProcess:
        return False
    except psutil.TimeoutExpired:
        process.kill()
    _, left = psutil.wait_procs(children, END_S)
    for child in left:
        with contextlib.suppress(psutil.Error):
            child.kill()
    _, left = psutil.wait_procs(left, END_S)
    if left:
        raise ClusterError(f"the head's processes {[child.pid for child in left]} do not end; end them by hand")
    return True


def _wait_until_ready(process: "subprocess.Popen[bytes]", ready: Path, log: Path, began: int) -> Head:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if ready.exists():
            return Head(**json.loads(ready.read_text(encoding="utf-8")))
        time.sleep(0.05)
    words = log.read_bytes()[began:].decode(errors="replace").strip()  # without those of an earlier head
    why = telling_line(words) if crash_dump(words.splitlines()) else words.rpartition("\n")[2]
    raise ClusterError(f"cluster: Ray did not start on this machine ({(why or 'no word')[:300]}); see {log}")


def _serve(ready: Path, slots: int, cpus_per_actor: float, gpus: float) -> None:
    """Start Ray, write where it is to `ready`, and wait for SIGTERM."""
    from ray_probe.cluster.connection import Demand, connected

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal is for the command, not for the service
    demand = Demand(1, cpus_per_actor, min(gpus, 1.0), {}, slots)
    with connected(None, "ray_probe_head", demand, log=lambda text: print(text, flush=True)) as info:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        me = psutil.Process()
        head = Head(me.pid, registry.created(me.pid), info.address, info.token_path, str(info.temp_dir))
        temporary = ready.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(head)), encoding="utf-8")
        temporary.replace(ready)
        threading.Thread(target=_end_with_its_command, daemon=True).start()
        signal.sigwait({signal.SIGTERM})
    print("the head has ended", flush=True)


def _end_with_its_command() -> None:
    """End when the command that started this process is gone before it has said that this is to stay."""
    if sys.stdin.buffer.readline() != STAY:
        os.kill(os.getpid(), signal.SIGTERM)


def main(arguments: list[str]) -> Any:
    """Entry point of the head's process: READY_FILE SLOTS CPUS_PER_ACTOR GPUS."""
    ready, slots, cpus_per_actor, gpus = arguments
    try:
        _serve(Path(ready), int(slots), float(cpus_per_actor), float(gpus))
    except ClusterError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main(sys.argv[1:])
