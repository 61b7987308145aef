"""Files of the committed gradient, in `.npy` format, read and written in pieces.

Numbers are not mapped: through a mapping, a full or failing disk ends the process with SIGBUS instead of an error.
"""

import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from ray_probe.core.arrays import Array
from ray_probe.errors import ConfigError, GradientError, NonFiniteError, bad_value
from ray_probe.system.digests import FileDigest
from ray_probe.system.files import writing

CHUNK = 4_000_000  # numbers in memory at once: 32 MB
NUMBER_BYTES = 8
DTYPE = "<f8"
STATES = "gradient-*.npy"
STAGED = "*gradient.staged"
DAMAGED = "is damaged: its sha256 is not the one that its commit put on record"

Part = npt.NDArray[np.floating[Any]]
Reader = Callable[[int, int], Array]


def state_name(rounds: int) -> str:
    """Returns the name of the file with the sum through `rounds` rounds."""
    return STATES.replace("*", f"{rounds - 1:06d}")


def reader_of(path: Path, size: int, seen: FileDigest) -> Reader:
    """Returns a function that reads ranges of a state; `seen` hashes them.

    Raises:
        ConfigError: the file is missing, cut short, or of another model.
    """
    try:
        there = open_memmap(path, mode="r")  # reads the header, and compares the file's length with it
        if (there.dtype, there.shape) != (np.dtype(DTYPE), (size,)):
            raise ValueError(f"it holds {there.dtype} of shape {there.shape}, the run's gradient has {size} numbers")
    except (OSError, ValueError) as error:
        raise unusable(path, f"cannot be read ({error})") from None
    offset = there.offset
    seen.take(0, np.fromfile(path, np.uint8, offset).data)

    def read(start: int, stop: int) -> Array:
        place = offset + NUMBER_BYTES * start
        values: Array = np.fromfile(path, DTYPE, stop - start, offset=place)
        seen.take(place, values.data)
        return values

    return read


def unusable(path: Path, why: str) -> ConfigError:
    """Returns the error of a state that a run cannot resume from."""
    remedy = f"{path.name} {why}, restore it or start a new run"
    earlier = path.with_suffix(".safetensors")
    if earlier.exists():
        remedy = f"{earlier.name} is in the format of an earlier ray_probe; resume with that one, or start a new run"
    return ConfigError(bad_value("--resume", str(path.parents[1]), remedy))


class Staging:
    """The next state, written bucket by bucket to a file with a name of its own.

    Args:
        directory: of the states.
        size: numbers of the gradient.

    Attributes:
        id: names this commit.
        path: its file. No other process writes to it, not even one that replaces this process.
        written: hashes the file.
        seen: hashes the file of the state before, as it is read.
        seen_window: hashes the file of the state at the window's start.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self.id = secrets.token_hex(8)
        self.path = directory / STAGED.replace("*", self.id + ".")
        self.written, self.seen, self.seen_window = FileDigest(), FileDigest(), FileDigest()
        self._size = size
        self._added: dict[int, tuple[int, list[float], list[float]]] = {}
        self._moved = False
        with writing(self.path):
            self._offset = open_memmap(self.path, mode="w+", dtype=DTYPE, shape=(size,)).offset  # writes the header
            self.written.take(0, np.fromfile(self.path, np.uint8, self._offset).data)

    def add(self, start: int, stop: int, part: Part, before: Reader, window: Reader) -> None:
        """Write a bucket, the state before plus `part`; it is on disk on return.

        `window` reads the state at the window's start.
        """
        assert part.shape == (stop - start,) and start not in self._added, "each bucket once"
        squares, products = [], []
        with writing(self.path), self.path.open("r+b") as stream:
            stream.seek(self._offset + NUMBER_BYTES * start)
            for first, last in chunks(start, stop):
                piece = part[first - start : last - start]
                earlier = before(first, last)
                values = earlier + piece
                squares.append(square(values))
                products.append(float((earlier - window(first, last)) @ piece))
                self._moved = self._moved or bool(piece.any())
                self.written.take(stream.tell(), values.data)
                stream.write(values.data)
            stream.flush()
            os.fsync(stream.fileno())
        self._added[start] = (stop, squares, products)

    def norm_sq(self) -> float:
        """Returns the squared norm of the whole gradient.

        Raises:
            GradientError: a bucket is missing, or the parts are zero everywhere.
            NonFiniteError: the sum holds NaN or infinity.
        """
        reached = 0
        for start, (stop, *_) in sorted(self._added.items()):
            reached = stop if start == reached else -1
        if reached != self._size:
            raise GradientError("gradient: not every bucket of it was written; nothing was committed")
        if self._size and not self._moved:
            raise GradientError(
                f"gradient: the sum over all responses is zero in each of {reached} numbers; nothing was committed; "
                "look at generation.top_p and temperature (one token left a step has no entropy) and model.trainable"
            )
        norm_sq = total(square for _, squares, _ in self._added.values() for square in squares)
        if not math.isfinite(norm_sq):
            raise NonFiniteError("gradient: the sum over all shards holds NaN or infinity; nothing was committed")
        return norm_sq

    def cross(self) -> float:
        """Returns the product of the parts with the sum of the window before them."""
        return total(product for _, _, products in self._added.values() for product in products)


def chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yields start and stop of the pieces that fit in memory."""
    for first in range(start, stop, CHUNK):
        yield first, min(first + CHUNK, stop)


def square(values: Array) -> float:
    """Returns the squared norm of a piece."""
    return float(values @ values)


def total(squares: Iterable[float]) -> float:
    """Returns the sum, rounded once, so its bits do not depend on the order."""
    squares = list(squares)
    plain = sum(squares)
    return math.fsum(squares) if math.isfinite(plain) else plain
