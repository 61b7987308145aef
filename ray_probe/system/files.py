"""Files that are complete after a crash, and locks on files."""

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from ray_probe.errors import ConfigError, OutputError, bad_value
from ray_probe.system.clock import wait_until

WAIT = "wait for it or stop it"


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns disk errors into OutputError, one line that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(unwritable(path, error)) from error


def unwritable(path: Path, error: OSError) -> str:
    """Returns one line: the file of a run, why it cannot be written, and the remedy."""
    return f"{path}: cannot be written ({error.strerror}); {write_remedy(error)}, then go on with run --resume"


def write_remedy(error: OSError) -> str:
    """Returns what makes a file writable, by the kind of error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "let this user write there"
    return "see to the disk"


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file; the name is on disk on return."""
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, private: bool = False) -> None:
    """Write, fsync and rename, so that a reader sees the old file or the new one.

    Args:
        path: of the file.
        data: its content.
        private: only the owner may read it (0600).

    Raises:
        OutputError: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with temporary.open("wb") as stream:
            if private:
                os.fchmod(stream.fileno(), 0o600)
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        put_in_place(temporary, path)


@contextlib.contextmanager
def held(
    path: Path,
    wait_s: float = 10.0,
    refused: Callable[[str], str] | None = None,
    waiting: Callable[[str], None] = lambda holder: None,
) -> Iterator[None]:
    """Hold a lock file (0600) for the block; the process's end releases it too.

    Args:
        path: the file; it stays, and names the last holder.
        wait_s: seconds to wait for another holder.
        refused: makes the error's line from the holder; None: a line that names the file.
        waiting: called once with the holder before a wait.

    Raises:
        ConfigError: another process holds it; names process, host and start.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not locked(descriptor, 0.0):
            if wait_s > 0:
                waiting(_holder(descriptor))
            if not locked(descriptor, wait_s):
                say = refused or (lambda holder: bad_value(path.name, str(path), f"{holder} holds it; {WAIT}"))
                raise ConfigError(say(_holder(descriptor)))
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{this_process()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def this_process() -> str:
    """Returns the holder for a lock file, with the host: hosts may share the disk."""
    return f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"


def locked(descriptor: int, wait_s: float) -> bool:
    """Lock an open file exclusively; returns whether that worked within `wait_s`."""

    def lock() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    return wait_until(lock, wait_s)
