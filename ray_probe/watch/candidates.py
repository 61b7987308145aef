"""Lists the checkpoint directories below a trainer's output directory."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from ray_probe.watch.layouts import final_path, step_of

DEPTH = 3
"""Checkpoints lie this many levels below the watched directory, at most."""

_NAMES = re.compile(
    r"checkpoint-\d+|global_steps?_?\d+(?:_hf)?|(?:tmp_|old_)?step[_-]\d+|epoch_\d+|iter_\d{7}|weight_v\d+"
)
_SIGNS = re.compile(
    r"config\.json|adapter_config\.json|.*\.safetensors(?:\.index\.json)?|\.metadata|trainer_state\.json|"
    r"CHECKPOINT_COMPLETE|STABLE|training_info\.json|recipe_state\.pt"
)
_NO_POLICY = {"_critic", "critic"}


@dataclass(frozen=True)
class Candidate:
    """A directory that is, or will be, a checkpoint.

    Attributes:
        path: where it lies now.
        key: where it lies once its trainer has renamed it.
        step: of the trainer, the last integer of its name; None without one.
    """

    path: Path
    key: str
    step: int | None


def checkpoints(root: Path) -> list[Candidate]:
    """Return the checkpoint directories below a directory, by step, then by path.

    Checkpoints inside checkpoints, hidden directories and links to others of the listed ones are left out.
    """
    paths = {str(path) for path in _below(root.resolve(), root.resolve(), DEPTH)}
    # While NeMo-RL saves a step again, its new and its old directory are there together, or one of them and the final.
    final = {str(final_path(Path(path))): path for path in sorted(paths) if str(final_path(Path(path))) not in paths}
    found = {path: path for path in paths if str(final_path(Path(path))) == path} | final
    listed = [Candidate(Path(path), key, step_of(Path(key))) for key, path in found.items()]
    return sorted(listed, key=lambda one: (one.step is None, one.step or 0, one.key))


def is_checkpoint(directory: Path) -> bool:
    """Return whether a directory has a checkpoint's name, or a file of one."""
    if _NAMES.fullmatch(directory.name):
        return True
    with os.scandir(directory) as entries:
        return any(_SIGNS.fullmatch(entry.name) for entry in entries)


def _below(directory: Path, root: Path, depth: int) -> list[Path]:
    try:
        children = sorted(path for path in directory.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # it vanished in between
        return []
    found: list[Path] = []
    for child in children:
        if child.name in _NO_POLICY or (child.is_symlink() and child.resolve().is_relative_to(root)):
            continue
        try:
            found += [child] if is_checkpoint(child) else _below(child, root, depth - 1) if depth > 1 else []
        except OSError:
            continue
    return found
