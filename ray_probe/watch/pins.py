"""Holds the files of a finished checkpoint, so that its trainer may delete it.

    DIRECTORY/pins/TOKEN/NAME/    the files that a measurement reads, hard links or copies

A pin belongs to the entry that names it.
"""

import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

from ray_probe.watch.found import Found
from ray_probe.watch.model_files import (
    ADAPTER_FILES,
    CONFIG,
    GENERATION,
    TOKENIZER_FILES,
    kind_of,
    matching,
    missing_weights,
    weight_files,
)

PINS = "pins"


class MovedError(Exception):
    """The checkpoint's files changed or went while they were pinned."""


def measured_files(found: Found) -> list[Path]:
    """Return the files of a ready checkpoint that decide its result.

    Files that a trainer adds later, beside the model, are not among them.
    """
    if found.adapter is not None:
        return matching(found.adapter, ADAPTER_FILES)
    assert found.model is not None, "it is ready"
    own = matching(found.model.config, (CONFIG, GENERATION)), matching(found.model.tokenizer, TOKENIZER_FILES)
    return [*weight_files(found.model.weights), *own[0], *own[1]]


def pin(directory: Path, name: str, found: Found) -> Path:
    """Pin a ready checkpoint or adapter; returns the directory with its files.

    Args:
        directory: of the watch's files.
        name: of the checkpoint's directory.
        found: the ready checkpoint.

    Raises:
        MovedError: its files changed or vanished meanwhile; nothing is left behind.
        OSError: the files can be neither linked nor copied; likewise.
    """
    place = directory / PINS / secrets.token_hex(6) / name
    try:
        place.mkdir(parents=True)
        link_or_copy(measured_files(found), place)
        if (what := missing_weights(place, kind_of(place))) is not None:
            raise MovedError(what)
    except FileNotFoundError as error:
        remove(place)
        raise MovedError(str(error)) from None
    except BaseException:
        remove(place)
        raise
    return place


def link_or_copy(files: Sequence[Path], place: Path) -> None:
    """Hard-link files into a directory, or copy them where links are impossible.

    Raises:
        MovedError: a file changed while it was copied.
        OSError: a file cannot be copied; FileNotFoundError: it is gone.
    """
    for file in files:
        real = Path(os.path.realpath(file))
        try:
            os.link(real, place / file.name)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without hard links
            before = real.stat()
            shutil.copy2(real, place / file.name)
            after = real.stat()
            if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
                raise MovedError(file.name) from None


def pin_tree(directory: Path, source: Path) -> Path:
    """Hard-link every file below a directory; returns the copy of the tree.

    Raises OSError where links are impossible.
    """
    place = directory / PINS / secrets.token_hex(6) / source.name
    try:
        shutil.copytree(source, place, copy_function=os.link)
    except (OSError, shutil.Error) as error:
        remove(place)
        raise OSError(f"{source}: {error}") from None
    return place


def remove(place: Path | str) -> None:
    """Remove a pin; the trainer's own files stay."""
    path = Path(place)
    if path.parent.parent.name == PINS:
        path = path.parent
    shutil.rmtree(path, ignore_errors=True)


def sweep(directory: Path, kept: Sequence[str]) -> None:
    """Remove the pins that no entry names, as a watch leaves them that is killed."""
    tokens = {Path(pin).parent.name for pin in kept}
    for path in (directory / PINS).glob("*"):
        if path.name not in tokens:
            shutil.rmtree(path, ignore_errors=True)
