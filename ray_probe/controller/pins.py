"""Pins a queued checkpoint: links or copies that its trainer cannot change.

    DIRECTORY/pins/TOKEN/model/NAME/      files of the checkpoint, hard links or copies
    DIRECTORY/pins/TOKEN/adapter/NAME/    files of the adapter on it

A pin belongs to the measurement that names it. A service removes all other pins, such as incomplete copies, when it
starts.
"""

import errno
import os
import secrets
import shutil
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

from ray_probe.checkpoints.files import stamp_of
from ray_probe.controller.sources import How, Source
from ray_probe.errors import CheckpointError, ConfigError, OutputError, bad_value
from ray_probe.system.files import sync_directory, write_remedy

PINS = "pins"
_KINDS = {
    "model.path": "model", "model.adapter": "adapter",
    "compare.against": "against", "compare.adapter": "against-adapter",
}  # fmt: skip
_BASE_OF = {"model.adapter": "model.path", "compare.adapter": "compare.against"}


def pin(directory: Path, sources: Sequence[Source], how: How) -> tuple[Path, list[Source]]:
    """Pins checkpoint and adapter; returns the pin's directory and the sources.

    Prompts are not pinned. The base of an adapter, which no trainer writes to, is hard-linked in either case, and read
    in place if that fails.

    Args:
        directory: of the service.
        sources: without stamps.
        how: hard links, or copies for trainers that write into existing files.

    Raises:
        ConfigError: a file cannot be hard-linked.
        CheckpointError: files changed or vanished meanwhile.
        OutputError: a copy cannot be written.
    """
    own = directory / PINS / secrets.token_hex(8)
    bases = {_BASE_OF[source.field] for source in sources if source.field in _BASE_OF}
    pinned = []
    try:
        own.mkdir(mode=0o700, parents=True)
        for source in sources:
            is_base = source.field in bases
            pinned.append(source if source.field not in _KINDS else _pinned(own, source, how, is_base))
        sync_directory(own.parent)
    except OSError as error:
        remove(own)
        remedy = f"a checkpoint cannot be pinned there ({error.strerror}); {write_remedy(error)}"
        raise OutputError(bad_value("output.dir", str(directory.parent), remedy)) from error
    except BaseException:
        remove(own)
        raise
    return own, pinned


def remove(own: Path | str) -> None:
    """Removes a pin; the original files stay."""
    shutil.rmtree(own, ignore_errors=True)


def sweep(directory: Path, kept: Collection[str]) -> list[str]:
    """Removes the pins that no open measurement names; returns them.

    Args:
        directory: of the service.
        kept: the pins of open measurements.
    """
    left = [str(path) for path in sorted((directory / PINS).glob("*")) if str(path) not in kept]
    for path in left:
        remove(path)
    return left


def _pinned(own: Path, source: Source, how: How, is_base: bool) -> Source:
    place = own / _KINDS[source.field] / (Path(source.place).name or "root")
    place.mkdir(parents=True)
    files = source.files
    if how == "copy" and not is_base:
        _copy_all(source, files, place)
        return replace(source, pinned=str(place), how="copy")
    try:
        _link(source, files, place)
    except ConfigError:
        if not is_base:
            raise
        shutil.rmtree(place)
        return source
    return replace(source, pinned=str(place), how="link")


def _link(source: Source, files: Sequence[Path], place: Path) -> None:
    for file in files:
        try:
            os.link(os.path.realpath(file), place / file.name)
        except FileNotFoundError:
            raise _moving(source, "vanished") from None
        except OSError as error:
            why = "it lies on another file system" if error.errno == errno.EXDEV else f"{error.strerror}: {file.name}"
            remedy = f"{source.place} cannot be hard-linked into the service's directory ({why})"
            remedy += "; use probe --snapshot-copy (model.snapshot: copy), or move output.dir beside it"
            raise ConfigError(bad_value("model.snapshot", "link", remedy)) from None


def _copy_all(source: Source, files: Sequence[Path], place: Path) -> None:
    """Copies files to disk. Raises OSError when they cannot be written."""
    try:
        before = stamp_of(files)
        _check_room(place, sum(file.stat().st_size for file in files))
        for file in files:
            copy_file(file, place / file.name)
        if stamp_of(source.files) != before:
            raise _moving(source, "changed")
    except FileNotFoundError:
        raise _moving(source, "vanished") from None
    sync_directory(place)


def copy_file(file: Path, target: Path) -> None:
    """Copies a file; it is on disk on return."""
    shutil.copyfile(file, target)
    with target.open("rb") as copy:
        os.fsync(copy.fileno())


def _check_room(place: Path, needed: int) -> None:
    free = shutil.disk_usage(place).free
    if free < needed:
        what = f"{needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        raise OutputError(bad_value("model.snapshot", "copy", f"{what} in {place.parents[3]}; make room, or use link"))


def _moving(source: Source, how: str) -> CheckpointError:
    remedy = f"its files {how} while they were pinned; probe it again once it is written"
    return CheckpointError(bad_value(source.field, source.place, remedy))
