"""The committed gradient on disk: float64, summed over all finished rounds.

The sum through a round lies in `gradient-ROUND.npy`. A commit writes the next one to a staging file beside it and
renames that once it is complete. The state before stays until the rounds count, so a complete state is on disk at any
time, and memory holds one chunk of it.

The sha256 of each state is taken while it is written, and recorded with its rounds. A resume, the next commit and the
mean read a whole state: they hash what they read, and refuse a state whose sha256 is not the recorded one.

Commits in a row that share no prompt form a window. A commit's product with the sum of the earlier commits of its
window needs the state at the window's start, which stays on disk as long as the window.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.safetensors_stream import header
from ray_probe.gradient.state_file import (
    DAMAGED,
    DTYPE,
    STAGED,
    STATES,
    Part,
    Reader,
    Staging,
    chunks,
    reader_of,
    square,
    state_name,
    total,
    unusable,
)
from ray_probe.system.digests import FileDigest
from ray_probe.system.failpoints import fail_at
from ray_probe.system.files import put_in_place, writing

NO_DIGESTS: Mapping[int, str] = {}


class NotStaged(Exception):
    """The process that staged the commit is gone: the commit must be restarted."""


class GradientStore:
    """Adds the reduced buckets of each commit to the gradient on disk.

    Args:
        directory: of the states.
        layout: names and shapes of the parameters.
    """

    def __init__(self, directory: Path, layout: ParameterLayout) -> None:
        self._directory = directory
        self._layout = layout
        self._rounds = self._window = 0
        self._staging: Staging | None = None
        self._sha256: dict[int, str] = {}
        self.cross = 0.0
        """Product of the last commit's gradient with the sum of the earlier commits of its window."""

    @property
    def sha256(self) -> str | None:
        """Digest of the committed state's file, hexadecimal; None before any round."""
        return self._sha256.get(self._rounds)

    def open(self, rounds: int, sha256: Mapping[int, str] = NO_DIGESTS, window: int = 0) -> float:
        """Resume from a state and remove the others; returns its squared norm.

        Args:
            rounds: finished rounds that the state sums.
            sha256: recorded digests of states' files, by rounds; a file without one is not compared.
            window: rounds before the window of the last commit; that state stays too.

        Raises:
            ConfigError: the state is missing, damaged, or of another model.
        """
        self.go_on(rounds, sha256, window)
        norm_sq = self._norm_sq(rounds)
        self.settle()
        return norm_sq

    def go_on(self, rounds: int, sha256: Mapping[int, str] = NO_DIGESTS, window: int = 0) -> None:
        """Resume after a crash of the writer, which may have committed a later state."""
        self._rounds, self._window = rounds, window
        self._sha256 = dict(sha256)

    def begin(self, window: int = 0) -> str:
        """Start a commit and drop an unfinished one. Returns the id that `add` needs.

        Args:
            window: rounds before the window of this commit: as in the commit before, or all committed rounds.
        """
        _remove(self._directory.glob(STAGED))
        self._window = window
        self._staging = Staging(self._directory, self._layout.size)
        return self._staging.id

    def add(self, staging: str, start: int, stop: int, part: Part) -> None:
        """Stage a bucket: the committed numbers plus `part` [stop - start].

        It is on disk on return. A bucket of an earlier `staging` is ignored.
        """
        if self._staging is None or staging != self._staging.id:
            return
        fail_at("write_before_add", str(start))
        readers = self._reader(self._rounds, self._staging.seen), self._reader(self._window, self._staging.seen_window)
        self._staging.add(start, stop, part, *readers)
        fail_at("write_after_add", str(start))

    def holds(self, staging: str) -> bool:
        """Returns whether buckets can be added to this commit."""
        return self._staging is not None and staging == self._staging.id

    def commit_once(self, staging: str, rounds: int) -> float:
        """Commit what was staged, unless it is committed; returns its squared norm.

        `cross` belongs to this commit then.

        Raises:
            NotStaged: it is not staged and was not committed.
            GradientError, NonFiniteError: as `commit`.
        """
        if self._state(rounds).exists():  # `open` has removed later states, so this commit has put it there
            if self._rounds != rounds:  # another process committed it
                self.cross = self._cross_of(self._rounds, rounds)
            self._rounds = rounds
            return self._norm_sq(rounds)
        if not self.holds(staging):
            raise NotStaged(f"gradient: nothing is staged for the rounds before {rounds}")
        return self.commit(rounds)

    def commit(self, rounds: int) -> float:
        """Commit the staged state through `rounds` rounds; returns its squared norm.

        The state before stays until `settle`: the rounds count only once their lines are written.

        Raises:
            GradientError: a bucket is missing, or the parts are zero everywhere.
            NonFiniteError: the sum holds NaN or infinity.
            ConfigError: the state before is damaged.
        """
        staging = self._staging
        assert staging is not None, "begin first"
        norm_sq, self.cross = staging.norm_sq(), staging.cross()
        self._check(self._rounds, staging.seen)
        self._check(self._window, staging.seen_window)
        fail_at("write_before_commit", str(rounds))
        self._staging = None
        with writing(self._state(rounds)):
            sha256 = staging.written.finish(staging.path)
            put_in_place(staging.path, self._state(rounds))
        self._rounds = rounds
        self._sha256[rounds] = sha256
        fail_at("write_after_commit", str(rounds))
        return norm_sq

    def settle(self) -> None:
        """Remove all states but the committed one and that at its window's start."""
        fail_at("write_before_settle", str(self._rounds))
        kept = self._state(self._rounds), self._state(self._window)
        _remove(path for path in self._directory.glob(STATES) if path not in kept)
        _remove(self._directory.glob(STAGED))
        fail_at("write_after_settle", str(self._rounds))

    def read(self, start: int, stop: int) -> Array:
        """Returns a range of the committed sum [stop - start]."""
        return self._reader(self._rounds, FileDigest())(start, stop)

    def save_mean(self, path: Path, rounds: int, sequences: int) -> None:
        """Write the sum through `rounds` rounds, divided by `sequences`, as safetensors."""
        temporary, seen = path.with_name(path.name + ".tmp"), FileDigest()
        read = self._reader(rounds, seen)
        with writing(path):
            with temporary.open("wb") as stream:
                stream.write(header(self._layout.ranges()))
                for first, last in chunks(0, self._layout.size):
                    stream.write((read(first, last) / sequences).astype(DTYPE, copy=False).data)
                stream.flush()
                os.fsync(stream.fileno())
            self._check(rounds, seen)
            put_in_place(temporary, path)

    def _norm_sq(self, rounds: int) -> float:
        seen = FileDigest()
        read = self._reader(rounds, seen)
        norm_sq = total(square(read(first, last)) for first, last in chunks(0, self._layout.size))
        self._check(rounds, seen)
        return norm_sq

    def _cross_of(self, before: int, after: int) -> float:
        """Returns the product of a commit with its window before it, read from disk."""
        seen = [FileDigest() for _ in range(3)]
        read = [self._reader(rounds, one) for rounds, one in zip((self._window, before, after), seen, strict=True)]
        products = []
        for first, last in chunks(0, self._layout.size):
            window, earlier, now = (reader(first, last) for reader in read)
            products.append(float((earlier - window) @ (now - earlier)))
        for rounds, one in zip((self._window, before, after), seen, strict=True):
            self._check(rounds, one)
        return total(products)

    def _check(self, rounds: int, seen: FileDigest) -> None:
        """Raises ConfigError for a state whose digest differs from the recorded one."""
        if rounds:
            found = seen.finish(self._state(rounds))
            if found != self._sha256.setdefault(rounds, found):
                raise unusable(self._state(rounds), DAMAGED)

    def _reader(self, rounds: int, seen: FileDigest) -> Reader:
        """Returns a function that reads ranges of a state; before any round they are zero."""
        if rounds == 0:
            return lambda start, stop: np.zeros(stop - start)
        return reader_of(self._state(rounds), self._layout.size, seen)

    def _state(self, rounds: int) -> Path:
        return self._directory / state_name(rounds)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
