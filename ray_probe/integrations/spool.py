"""Writes requests for measurements into a directory that `ray-probe watch` reads.

    SPOOL/000000000120-TOKEN.json    a request, complete as soon as it has this name
    SPOOL/pins/120-TOKEN/            hard links to the checkpoint's files

A hook does this in the trainer's own thread: links and a rename take microseconds. A thread beside it would lose the
last checkpoint when the trainer's process ends. Nothing waits for the disk (fsync), which is busy right after a save.
"""

import contextlib
import errno
import fnmatch
import json
import logging
import operator
import os
import secrets
import shutil
import string
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import SupportsIndex

from ray_probe.errors import CheckpointError, ConfigError, OutputError, bad_value, first_line

SCHEMA_VERSION = 1
SPOOL = ".ray_probe"
"""Name of the spool in a trainer's output directory, where `ray-probe watch` looks for it."""
PINS = "pins"
MODEL_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
"""What a model needs. Optimizer, scheduler and random states have other names."""

_WEIGHTS = "*.safetensors"
_NO_LINKS = {errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP}
"""The file system, or its protection of others' files, does not allow hard links."""
_ROOM = 2
"""Checkpoints that must still fit beside a pin: what it keeps may not cost the trainer its next saves."""
_logger = logging.getLogger("ray_probe")


def request(
    spool: Path | str,
    checkpoint: Path | str,
    step: SupportsIndex,
    trainer: str,
    tags: Mapping[str, str] | None = None,
    *,
    source: Path | str | None = None,
    pin: bool = True,
) -> Path:
    """Request the measurement of a checkpoint; returns the request's file.

    Args:
        spool: directory of requests; created where it is missing.
        checkpoint: directory with the files of a model, which the trainer has finished.
        step: of the trainer, at least 0.
        trainer: its name.
        tags: labels that results show beside the step.
        source: directory that the trainer writes for this step, where `checkpoint` lies in it; None: the same.
        pin: hard-link the files first, so that the checkpoint outlasts the trainer's rotation. A directory without
            safetensors files at its top is named as it is, and one where links are impossible or the disk is nearly
            full.

    Raises:
        ConfigError: step or tags cannot be used.
        CheckpointError: the directory is not there, or vanished meanwhile.
        OutputError: the spool cannot be written.
    """
    spool, checkpoint = Path(os.path.abspath(spool)), Path(os.path.abspath(checkpoint))
    number = _checked(step, tags or {})
    # Letters alone, so that the last number in the pin's name is the step, as in a trainer's directories. `secrets`
    # leaves the state of `random` alone, which a trainer may have seeded.
    token = "".join(secrets.choice(string.ascii_lowercase) for _ in range(12))
    place = spool / PINS / f"{number}-{token}"
    with _writing(spool), contextlib.ExitStack() as on_failure:
        on_failure.callback(shutil.rmtree, place, ignore_errors=True)
        spool.mkdir(parents=True, exist_ok=True)
        pinned = _pin(checkpoint, place) if pin else _unpinned(checkpoint)
        content = {
            "schema_version": SCHEMA_VERSION, "checkpoint": str(place if pinned else checkpoint), "step": number,
            "trainer": trainer, "tags": dict(tags or {}), "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "pinned": pinned, "source": os.path.abspath(source or checkpoint),
        }  # fmt: skip
        _write(path := spool / f"{number:012d}-{token}.json", content)
        on_failure.pop_all()
    return path


def hand_over(
    spool: Path | str, checkpoint: Path | str, step: SupportsIndex, trainer: str, tags: Mapping[str, str] | None = None
) -> None:
    """Request a measurement from a training loop: a failure is one warning in the log."""
    with warned_only():
        request(spool, checkpoint, step, trainer, tags)


@contextlib.contextmanager
def warned_only() -> Iterator[None]:
    """Turn any exception of the block into one warning: training goes on."""
    try:
        yield
    except Exception as error:
        _logger.warning("ray_probe: this checkpoint will not be measured: %s", first_line(error))


def has_weights(directory: Path) -> bool:
    """Return whether a directory has safetensors files at its top."""
    return next(directory.glob(_WEIGHTS), None) is not None


def _checked(step: SupportsIndex, tags: Mapping[str, str]) -> int:
    if isinstance(step, bool) or not isinstance(step, SupportsIndex) or (number := operator.index(step)) < 0:
        raise ConfigError(bad_value("step", step, "give an integer of at least 0"))
    wrong = {name: text for name, text in tags.items() if not (isinstance(name, str) and isinstance(text, str))}
    if wrong:
        raise ConfigError(bad_value("tags", wrong, "give names and values as texts"))
    return number


@contextlib.contextmanager
def _writing(spool: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = f"it cannot be written ({error.strerror}); make room, or let this user write there"
        raise OutputError(bad_value("spool", str(spool), remedy)) from error


def _unpinned(source: Path) -> bool:
    if not source.is_dir():
        raise _missing(source, "it is no directory")
    return False


def _pin(source: Path, place: Path) -> bool:
    """Link a model's files into `place`; returns whether that was possible."""
    try:
        with os.scandir(source) as entries:
            names = sorted(entry.name for entry in entries if entry.is_file())
    except OSError as error:
        raise _missing(source, f"it cannot be read ({error.strerror})") from error
    files = [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in MODEL_FILES)]
    if not fnmatch.filter(files, _WEIGHTS) or not _has_room(source, place):
        return False
    place.mkdir(parents=True)
    for name in files:
        try:
            os.link(os.path.realpath(source / name), place / name)
        except FileNotFoundError:
            raise _missing(source, f"{name} vanished while it was pinned") from None
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            shutil.rmtree(place, ignore_errors=True)
            return False
    return True


def _has_room(source: Path, place: Path) -> bool:
    """Return whether a pin leaves the trainer room for its next saves."""
    size = 0
    for where, _, names in os.walk(source):
        for name in names:
            with contextlib.suppress(OSError):  # it vanished in between
                size += os.stat(os.path.join(where, name)).st_size
    free = shutil.disk_usage(place.parents[1]).free
    if free < _ROOM * size:
        what = f"{free / 1e9:.2f} GB are free and {_ROOM * size / 1e9:.2f} GB must be, for the trainer's next saves"
        _logger.warning("ray_probe: %s is not pinned: %s; start ray-probe watch, or make room", source, what)
        return False
    return True


def _missing(source: Path, why: str) -> CheckpointError:
    return CheckpointError(bad_value("checkpoint", str(source), f"{why}; request it once it is written"))


def _write(path: Path, content: Mapping[str, object]) -> None:
    """Write a request under another name and rename it: a reader never sees a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
