"""Files that a crash leaves either as they were or as they should be."""

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
    """Disk errors become one line that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(unwritable(path, error)) from error


def unwritable(path: Path, error: OSError) -> str:
    """One line that names a file of a run, why it cannot be written, and what to do about that."""
    return f"{path}: cannot be written ({error.strerror}); {write_remedy(error)}, then go on with run --resume"


def write_remedy(error: OSError) -> str:
    """What makes a file writable again, by the kind of error."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "make room"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "let this user write there"
    return "see to the disk"


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a file that is on disk its name; on return the name is on disk too."""
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes, private: bool = False) -> None:
    """Write, fsync, rename: a reader sees the old file or the new one. Raises OutputError when it cannot.

    Args:
        path: of the file.
        data: what it shall hold.
        private: only its owner may read it (0600).
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
    """Hold a lock file (0600) for the block. The lock goes with this process, however that ends: none is ever stale.

    Args:
        path: the file; it stays, empty or with the last holder in it.
        wait_s: seconds to wait for another holder, one that is about to end say.
        refused: from the holder to the line of the error; None: one that names the file.
        waiting: told the holder, once, when it has to be waited for.

    Raises:
        ConfigError: another process holds it; says which, on which host, since when.
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
    """What a lock file says of who holds it: the file may lie on a disk that several hosts share."""
    return f"process {os.getpid()} on {socket.gethostname()} since {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _holder(descriptor: int) -> str:
    return os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"


def locked(descriptor: int, wait_s: float) -> bool:
    """Locks an open file for this descriptor alone. Returns whether the lock was free within `wait_s` seconds."""

    def lock() -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    return wait_until(lock, wait_s)
