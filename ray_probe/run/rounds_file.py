"""Reads and writes rounds.jsonl: one line a finished round."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from ray_probe.core.estimator.modes import Mode
from ray_probe.run.result import Beta, Entropy, Parity
from ray_probe.system.digests import chained, lost_its_end, unchained
from ray_probe.system.files import writing
from ray_probe.system.json_object import JsonObject


@dataclass(frozen=True)
class Advantage(JsonObject):
    """The advantage of one baseline over the tokens of a round."""

    mean: float | None = None
    """Mean, nats."""
    variance: float | None = None
    """Centred variance, nats^2."""
    mean_square: float | None = None
    """Mean square, nats^2."""


@dataclass(frozen=True)
class FinishedRound(JsonObject):
    """A line of rounds.jsonl. Rounds, shards and actors count from 0."""

    OMITTED: ClassVar[frozenset[str]] = frozenset({"gradient_norm_sq", "gradient_cross", "gradient_window", "actors"})

    round: int
    """Round in the plan."""
    shards: int = 0
    """Shards whose record and gradient count."""
    sequences: int = 0
    """Responses."""
    tokens: int = 0
    """Response tokens."""
    eos_only: int = 0
    """Responses that ended at their first token."""
    truncated: int = 0
    """Responses cut at the cap."""
    shards_retried: int = 0
    """Shards that were computed more than once."""
    given_up: tuple[str, ...] = ()
    """Ids of shards that failed too often."""
    records: tuple[int, ...] = ()
    """Shards whose record the fit holds."""
    shards_by_actor: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Actor and the shards whose gradient it computed."""
    beta_version: int = 0
    """Version of `fit`."""
    beta: tuple[float, ...] | None = None
    """Coefficients of `fit`."""
    fit: Beta = field(default_factory=Beta)
    """The global fit after the round."""
    advantage: Mapping[Mode, Advantage] = field(default_factory=dict)
    """By baseline."""
    entropy: Entropy = field(default_factory=Entropy)
    """Entropy of the round's responses."""
    parity: Parity = field(default_factory=Parity)
    """Parity of the round."""
    seconds: float = 0.0
    """On the clock, its share of the commit included."""
    gradient_norm_sq: float | None = None
    """Squared norm of the gradient summed over all committed rounds; on the last line of a commit."""
    gradient_cross: float | None = None
    """Product of the commit's gradient with the earlier commits of its window; on the last line of a commit."""
    gradient_window: int | None = None
    """Rounds before that window, in which no two commits share a prompt; on the last line of a commit."""
    actors: int | None = None
    """Rollout actors requested; on the last line of a commit."""
    group: tuple[int, int] = (0, 0)
    """First and last round of the commit."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """Digests of the round's files in `state/`, hexadecimal."""


class RoundsFile:
    """The file rounds.jsonl, each line with a checksum that continues the one before.

    Args:
        path: of the file.
        unreadable: makes an error of a place in the file and a cause.
    """

    def __init__(self, path: Path, unreadable: Callable[[str, Exception], Exception]) -> None:
        self._path = path
        self._unreadable = unreadable
        self._chain: int | None = None  # checksum that the next line continues from; None: the file is read first

    def read(self) -> list[FinishedRound]:
        """Return the finished rounds, without a torn last line or commit group.

        Raises what `unreadable` makes, naming the line, for damage before the end.
        """
        return self._whole_lines()[1]

    def append(self, rounds: Sequence[FinishedRound]) -> None:
        """Write the rounds of one commit, all or none. Raises OutputError."""
        chain, text, whole = self._chain, b"", None
        if chain is None:
            whole, _, chain = self._whole_lines()
        for entry in rounds:
            data, chain = chained(json.dumps(entry.to_json(), allow_nan=False), chain)
            text += data
        with writing(self._path), self._path.open("ab") as stream:
            if whole is not None:  # a crash may have left lines that were never finished
                stream.truncate(whole)
            self._chain = None
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        self._chain = chain

    def _whole_lines(self) -> tuple[int, list[FinishedRound], int]:
        """Return bytes and rounds of the whole commit groups, and the last checksum."""
        *texts, tail = self._path.read_bytes().split(b"\n") if self._path.exists() else [b""]
        rounds, ends, chains = list[FinishedRound](), [0], [0]
        for number, text in enumerate(texts, start=1):
            try:
                fields, chain = unchained(text + b"\n", chains[-1])
                rounds.append(FinishedRound.from_json(fields))
            except ValueError as error:
                raise self._unreadable(f"{self._path.name} line {number}", error) from None
            chains.append(chain)
            ends.append(ends[-1] + len(text) + 1)
        if lost_its_end(tail, chains[-1]):
            raise self._unreadable(f"{self._path.name} line {len(ends)}", ValueError("its line break is damaged"))
        first, last = rounds[-1].group if rounds else (0, -1)
        finished = len(rounds) if last == len(rounds) - 1 else first
        return ends[finished], rounds[:finished], chains[finished]
