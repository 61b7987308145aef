"""Private directories of a Ray whose process was killed before it could remove them: the next start does.

Whoever uses such a directory holds a lock in it, which goes with the process however that ends. What nobody holds is
removed if it is this user's alone; a directory without a lock file is somebody else's business.
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
    """Hold the lock of a private directory for the block; the lock file is never there without being held."""
    new = directory / f"{LOCK}.new"
    descriptor = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        locked(descriptor, 0.0)
        new.rename(directory / LOCK)
        yield
    finally:
        os.close(descriptor)


def remove_leftovers(parent: Path, prefix: str) -> list[Path]:
    """Remove the directories of this name that were left behind; returns them.

    Args:
        parent: where they lie, a directory that others may write in, too.
        prefix: what their names begin with.
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
    shutil.rmtree(path, ignore_errors=True)  # follows no link
    return not path.exists()
