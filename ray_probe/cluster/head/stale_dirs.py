"""Removes private directories that killed processes left behind.

The user of such a directory holds a lock in it, which ends with the process. A directory without a lock file belongs
to another program.
"""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from ray_probe.system.files import locked

LOCK = "lock"


@contextlib.contextmanager
def in_use(directory: Path) -> Iterator[None]:
    """Holds the lock of a private directory for the block."""
    new = directory / f"{LOCK}.new"  # renamed once it is locked, so that no process finds the file unlocked
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        locked(descriptor, 0.0)
        new.rename(directory / LOCK)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(parent: Path, prefix: str) -> list[Path]:
    """Removes this user's directories with an unlocked lock file; returns them.

    Args:
        parent: directory that holds them; other users may write there.
        prefix: of their names.
    """
    return [path for path in sorted(parent.glob(f"{prefix}*")) if _is_left(path) and _removed(path)]


def _is_left(path: Path) -> bool:
    try:
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
            return False
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode) and locked(descriptor, 0.0)
    finally:
        os.close(descriptor)


def _removed(path: Path) -> bool:
    shutil.rmtree(path, ignore_errors=True)  # does not follow links
    return not path.exists()
