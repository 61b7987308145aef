"""The committed gradient on disk: summed over all finished rounds, float64, replaced whole. numpy only.

The sum through a round lies in `gradient-ROUND.safetensors`. A commit stages the next one beside it, bucket by bucket,
and gives it its name once it is whole; the one before stays until the rounds count. So there is a whole state on disk
at every moment, and no more of it in memory than a chunk.

What is staged is lost with its process, and the commit is begun anew then. That it was done is seen by the name: what
bears that of the next rounds was put there by this commit, as `open` removes all else.

The sha256 of each state is taken while it is written, and goes on record with the rounds. Whoever reads a whole state
(a resume, the next commit, the mean) hashes what is read, and refuses a state that is not the one on record.
"""

import contextlib
import math
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from ray_probe.core.arrays import Array
from ray_probe.errors import ConfigError, GradientError, NonFiniteError, bad_value
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.safetensors_stream import NUMBER_BYTES, header, numbers_start
from ray_probe.system.digests import FileDigest
from ray_probe.system.failpoints import fail_at
from ray_probe.system.files import put_in_place, writing

CHUNK = 4_000_000  # numbers in memory at once: 32 MB
TENSOR = "sum"
STAGED = "*gradient.staged"
DAMAGED = "is damaged: its sha256 is not the one that its commit put on record"

Part = npt.NDArray[np.floating[Any]]
Reader = Callable[[int, int], Array]


class NotStaged(Exception):
    """What was staged went with the process that had it: no fault of anybody; the commit is begun anew."""


class GradientStore:
    """Adds the reduced buckets of each commit to the gradient on disk.

    Args:
        directory: where the states are kept.
        layout: names and shapes of the parameters.
    """

    def __init__(self, directory: Path, layout: ParameterLayout) -> None:
        self._directory = directory
        self._layout = layout
        self._rounds = 0
        self._head = header([(TENSOR, (layout.size,), 0, layout.size)])
        self._staging = ""
        self._stream: BinaryIO | None = None
        self._added: dict[int, tuple[int, list[float]]] = {}
        self._moved = False
        self._sha256: dict[int, str] = {}
        self._written = self._seen = FileDigest()

    @property
    def sha256(self) -> str | None:
        """Digest of the committed state's file, hexadecimal; None before any round."""
        return self._sha256.get(self._rounds)

    def open(self, rounds: int, sha256: str | None = None) -> float:
        """Go on from the state through so many finished rounds, all else is removed; returns its squared norm.

        Args:
            rounds: finished rounds.
            sha256: digest of the state's file that their commit put on record; None: the file is taken as it is.

        Raises:
            ConfigError: the state is missing, damaged, or of another model.
        """
        self.go_on(rounds, sha256)
        norm_sq = self._norm_sq(rounds)
        self.settle()
        return norm_sq

    def go_on(self, rounds: int, sha256: str | None = None) -> None:
        """Go on after the process that had the state open died: what it may have committed is left where it is."""
        self._rounds = rounds
        self._sha256 = {} if sha256 is None else {rounds: sha256}

    def begin(self) -> str:
        """Start a commit; what was staged for another is thrown away. Returns what `add` needs."""
        self._close()
        _remove(self._directory.glob(STAGED))
        self._staging = secrets.token_hex(8)
        self._added, self._moved = {}, False
        self._written, self._seen = FileDigest(self._head), FileDigest()
        with writing(self._staged):
            self._stream = self._staged.open("wb")
            self._stream.write(self._head)
        return self._staging

    def add(self, staging: str, start: int, stop: int, part: Part) -> None:
        """Stage a bucket: what is committed there plus `part` [stop - start]; on return it is on disk.

        A bucket for a commit that was begun anew since (another `staging`) is left out.
        """
        if not self.holds(staging):
            return
        assert self._stream is not None and part.shape == (stop - start,) and start not in self._added, "each once"
        fail_at("write_before_add", str(start))
        squares = []
        with self._reading(self._rounds, self._seen) as read, writing(self._staged):
            self._stream.seek(len(self._head) + NUMBER_BYTES * start)
            for first, last in _chunks(start, stop):
                piece = part[first - start : last - start]
                values = read(first, last) + piece
                squares.append(_square(values))
                self._moved = self._moved or bool(piece.any())
                data = values.astype("<f8", copy=False).data
                self._written.take(len(self._head) + NUMBER_BYTES * first, data)
                self._stream.write(data)
            self._stream.flush()
            os.fsync(self._stream.fileno())
        self._added[start] = (stop, squares)
        fail_at("write_after_add", str(start))

    def holds(self, staging: str) -> bool:
        """Whether buckets for this commit can still be added."""
        return self._stream is not None and staging == self._staging

    def commit_once(self, staging: str, rounds: int) -> float:
        """Put in place what was staged under this name, however often it is asked for; returns its squared norm.

        Raises:
            NotStaged: it is gone, and was not put in place.
            GradientError, NonFiniteError: as `commit`.
        """
        if self._state(rounds).exists():
            self._rounds = rounds
            return self._norm_sq(rounds)
        if not self.holds(staging):
            raise NotStaged(f"gradient: nothing is staged for the rounds before {rounds}")
        return self.commit(rounds)

    def commit(self, rounds: int) -> float:
        """Put the staged state in place, as that through so many rounds; returns its squared norm.

        The state before stays until `settle`: the rounds count only once their lines are written.

        Raises:
            GradientError: what was added is zero everywhere, or not all of the gradient.
            NonFiniteError: the sum holds NaN or infinity.
            ConfigError: the state that it was added to is damaged.
        """
        norm_sq = self._check_staged()
        self._check(self._rounds, self._seen)
        fail_at("write_before_commit", str(rounds))
        self._close()
        with writing(self._state(rounds)):
            sha256 = self._written.finish(self._staged)
            put_in_place(self._staged, self._state(rounds))
        self._rounds = rounds
        self._sha256[rounds] = sha256
        fail_at("write_after_commit", str(rounds))
        return norm_sq

    def settle(self) -> None:
        """Remove every state but the committed one."""
        fail_at("write_before_settle", str(self._rounds))
        states = self._directory.glob("gradient-*.safetensors")
        _remove(path for path in states if path != self._state(self._rounds))
        _remove(self._directory.glob(STAGED))
        fail_at("write_after_settle", str(self._rounds))

    def read(self, start: int, stop: int) -> Array:
        """Part of the committed sum [stop - start]."""
        with self._reading(self._rounds) as read:
            return read(start, stop)

    def save_mean(self, path: Path, rounds: int, sequences: int) -> None:
        """Write the sum through so many rounds, divided by the responses, by parameter name, as safetensors."""
        temporary, seen = path.with_name(path.name + ".tmp"), FileDigest()
        with self._reading(rounds, seen) as read, writing(path):
            with temporary.open("wb") as stream:
                stream.write(header(self._layout.ranges()))
                for first, last in _chunks(0, self._layout.size):
                    stream.write((read(first, last) / sequences).astype("<f8", copy=False).data)
                stream.flush()
                os.fsync(stream.fileno())
            self._check(rounds, seen)
            put_in_place(temporary, path)

    def _check_staged(self) -> float:
        reached = 0
        for start, (stop, _) in sorted(self._added.items()):
            reached = stop if start == reached else -1
        if reached != self._layout.size:
            raise GradientError("gradient: not every bucket of it was written; nothing was committed")
        if not self._moved:
            raise GradientError(
                f"gradient: the sum over all responses is zero in each of {reached} numbers; nothing was committed; "
                "look at generation.top_p and temperature (one token left a step has no entropy) and model.trainable"
            )
        norm_sq = _total(square for _, squares in self._added.values() for square in squares)
        if not math.isfinite(norm_sq):
            raise NonFiniteError("gradient: the sum over all shards holds NaN or infinity; nothing was committed")
        return norm_sq

    def _norm_sq(self, rounds: int) -> float:
        seen = FileDigest()
        with self._reading(rounds, seen) as read:
            norm_sq = _total(_square(read(first, last)) for first, last in _chunks(0, self._layout.size))
        self._check(rounds, seen)
        return norm_sq

    def _check(self, rounds: int, seen: FileDigest) -> None:
        """Refuse a state whose file, as it was read, is not the one on record; one without a record is taken as it is.

        Raises ConfigError.
        """
        if rounds:
            found = seen.finish(self._state(rounds))
            if found != self._sha256.setdefault(rounds, found):
                raise unusable(self._state(rounds), DAMAGED)

    @contextlib.contextmanager
    def _reading(self, rounds: int, seen: FileDigest | None = None) -> Iterator[Reader]:
        """Reads ranges of the state through so many rounds, hashed by `seen`; before any round it is zero."""
        if rounds == 0:
            yield lambda start, stop: np.zeros(stop - start)
            return
        with contextlib.ExitStack() as opened:
            try:
                stream = opened.enter_context(self._state(rounds).open("rb"))
                offset = numbers_start(stream, TENSOR, self._layout.size)
            except (OSError, ValueError) as error:
                raise unusable(self._state(rounds), f"cannot be read ({error})") from None
            if seen is not None:
                stream.seek(0)
                seen.take(0, stream.read(offset))
            yield lambda start, stop: _numbers(stream, offset, start, stop, seen)

    def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    @property
    def _staged(self) -> Path:
        """Of a name of its own: a process that was thought dead puts in place what it has staged itself, or nothing."""
        return self._directory / STAGED.replace("*", self._staging + ".")

    def _state(self, rounds: int) -> Path:
        return self._directory / state_name(rounds)


def state_name(rounds: int) -> str:
    """Name of the file that holds the sum through so many rounds."""
    return f"gradient-{rounds - 1:06d}.safetensors"


def unusable(path: Path, why: str) -> ConfigError:
    """The error of a state that cannot be continued from: one line with the run, the file and what to do."""
    return ConfigError(bad_value("--resume", str(path.parents[1]), f"{path.name} {why}, restore it or start a new run"))


def _chunks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for first in range(start, stop, CHUNK):
        yield first, min(first + CHUNK, stop)


def _numbers(stream: BinaryIO, offset: int, start: int, stop: int, seen: FileDigest | None) -> Array:
    place = offset + NUMBER_BYTES * start
    stream.seek(place)
    data = stream.read(NUMBER_BYTES * (stop - start))
    if seen is not None:
        seen.take(place, data)
    return np.frombuffer(data, "<f8").astype(np.float64)


def _square(values: Array) -> float:
    return float(values @ values)


def _total(squares: Iterable[float]) -> float:
    """Their sum, rounded once: the same bits in whatever order buckets came."""
    squares = list(squares)
    plain = sum(squares)
    return math.fsum(squares) if math.isfinite(plain) else plain


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
