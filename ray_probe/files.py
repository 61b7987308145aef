"""Files that a crash leaves either as they were or as they should be."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from ray_probe.errors import OutputError


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Disk errors become one line that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror}); make room, then go on with run --resume"
        ) from error


def put_in_place(temporary: Path, path: Path) -> None:
    """Give a file that is on disk its name; on return the name is on disk too."""
    temporary.replace(path)
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync, rename: a reader sees the old file or the new one. Raises OutputError when it cannot."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with temporary.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        put_in_place(temporary, path)
