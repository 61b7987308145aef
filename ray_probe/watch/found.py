"""What is known of one checkpoint directory, and how long its files have stayed."""

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

State = Literal["ready", "waiting", "needs conversion", "skipped", "vanished"]


@dataclass(frozen=True)
class Stamp:
    """The files below a directory by name, size and time, and since when they are so.

    Attributes:
        digest: sha256 over names, sizes and times of change, hexadecimal.
        since: the caller's clock when they were first seen so, seconds.
    """

    digest: str
    since: float

    @classmethod
    def of(cls, directory: Path, earlier: "Stamp | None", now: float) -> "Stamp":
        """Return the present stamp; an unchanged directory keeps its earlier time."""
        digest = tree_digest(directory)
        return earlier if earlier is not None and earlier.digest == digest else cls(digest, now)


@dataclass(frozen=True)
class Model:
    """The directories that hold the parts of one checkpoint; mostly the same one.

    Attributes:
        weights: directory of its safetensors files.
        config: directory of config.json.
        tokenizer: directory of the tokenizer's files.
    """

    weights: Path
    config: Path
    tokenizer: Path


@dataclass(frozen=True)
class Found:
    """The judgement on one checkpoint directory.

    Attributes:
        state: ready to be measured; waiting, for `why`; needs conversion, by the command `why`; skipped, because of
            `why`; or vanished.
        layout: name of the layout that it is written in.
        step: of the trainer; None where the directory's name has no number.
        why: see `state`; empty when it is ready.
        model: of a ready checkpoint; of an adapter, its base.
        adapter: directory of a ready adapter, or None.
        source: directory that a conversion reads, where one is needed.
        stamp: for the next inspection.
    """

    state: State
    layout: str
    step: int | None
    why: str = ""
    model: Model | None = None
    adapter: Path | None = None
    source: Path | None = None
    stamp: Stamp | None = field(default=None, compare=False)


def tree_digest(directory: Path) -> str:
    """Return the sha256 over names, sizes and times of all files below a directory."""
    seen: list[tuple[str, int, int]] = []
    for folder, folders, files in os.walk(directory):
        folders.sort()
        seen.append((folder, 0, 0))
        for name in sorted(files):
            try:
                status = os.stat(os.path.join(folder, name))
            except OSError:  # it vanished in between
                continue
            seen.append((os.path.join(folder, name), status.st_size, status.st_mtime_ns))
    return hashlib.sha256(repr(seen).encode()).hexdigest()
