"""Requests that a trainer drops into the spool directory, one JSON file each.

    SPOOL/NAME.json    {"schema_version": 1, "checkpoint": "/abs/path", "step": 120, "trainer": "trl",
                        "tags": {"lr": "1e-6"}, "time": "2026-11-29T16:00:00+00:00"}
    SPOOL/pins/        checkpoints that the trainer's hook has pinned itself

A request for a pinned checkpoint names the trainer's own directory as its "source". The writer renames a finished file
to its name. Other keys are ignored.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ray_probe.watch.model_files import read_object
from ray_probe.watch.pins import PINS

SCHEMA_VERSION = 1
REJECTED = ".rejected"


@dataclass(frozen=True)
class Request:
    """What a trainer asks for.

    Attributes:
        file: of the request.
        checkpoint: directory to read, absolute.
        source: the trainer's own directory, where `checkpoint` is a pin of it; else the same.
        step: of the trainer; None: from the directory's name.
        tags: for the series, name to value.
    """

    file: Path
    checkpoint: Path
    source: Path
    step: int | None
    tags: Mapping[str, str]


class Spool:
    """The spool directory of a watch.

    Args:
        directory: of the requests; it need not exist yet.
        log: receives a line for each request that cannot be read.
    """

    def __init__(self, directory: Path, log: Callable[[str], None]) -> None:
        self.directory, self._log = directory.resolve(), log

    def requests(self) -> list[Request]:
        """Return the requests that wait, oldest first; renames those that are malformed."""
        found = []
        for file in sorted(self.directory.glob("*.json"), key=_age):
            if not file.is_file():
                continue
            problem, request = _request(file)
            if request is not None:
                found.append(request)
            elif file.exists():
                rejected = file.with_name(file.name + REJECTED)
                file.replace(rejected)
                self._log(f"{file}: {problem}; it is now {rejected.name}")
        return found

    def done(self, request: Request) -> None:
        """Remove a request, and the pin that its trainer made for it."""
        request.file.unlink(missing_ok=True)
        pins, place = self.directory / PINS, request.checkpoint.resolve()
        if place != pins and place.is_relative_to(pins):
            while place.parent != pins:
                place = place.parent
            shutil.rmtree(place, ignore_errors=True)


def _request(file: Path) -> tuple[str, Request | None]:
    """Return what is wrong with a request, and the request if it is sound."""
    raw = read_object(file)
    if raw is None:
        return "it is no JSON object", None
    version, checkpoint, step, tags = (raw.get(key) for key in ("schema_version", "checkpoint", "step", "tags"))
    source = checkpoint if raw.get("source") is None else raw["source"]
    if version != SCHEMA_VERSION or isinstance(version, bool):
        return f"its schema_version is {version!r}, need {SCHEMA_VERSION}", None
    for name, path in (("checkpoint", checkpoint), ("source", source)):
        if not isinstance(path, str) or not Path(path).is_absolute() or "\0" in path:
            return f"its {name} is {path!r}, need an absolute path", None
    if step is not None and (not isinstance(step, int) or isinstance(step, bool) or not 0 <= step < 2**63):
        return f"its step is {step!r}, need an integer >= 0 or null", None
    if tags is not None and not isinstance(tags, dict):
        return f"its tags are {tags!r}, need an object", None
    texts = {str(name): text for name, value in (tags or {}).items() if (text := _text(value)).strip()}
    return "", Request(file, Path(str(checkpoint)), Path(str(source)), step, texts)


def _text(value: object) -> str:
    """Return a tag as text: a config takes texts alone."""
    return value if isinstance(value, str) else json.dumps(value)


def _age(file: Path) -> tuple[float, str]:
    try:
        return file.stat().st_mtime, file.name
    except OSError:
        return 0.0, file.name
