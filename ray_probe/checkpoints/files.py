"""Files of a checkpoint or adapter: their names, JSON, and errors about them.

This module imports neither torch nor transformers, so that light processes can use it.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ray_probe.errors import CheckpointError, bad_value, some

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
# Only the files that decide a result: trainers also write optimizer states and logs into the directory.
ADAPTER_FILES = (
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.jinja",
)  # fmt: skip


def unusable(directory: Path | str, problem: str, remedy: str, field: str = "model.path") -> CheckpointError:
    """Return the one-line error of a directory that cannot be used.

    Args:
        directory: of the checkpoint or adapter.
        problem: what is wrong.
        remedy: what to do about it.
        field: config key of the directory.
    """
    return CheckpointError(bad_value(field, str(directory), " ".join(f"{problem}; {remedy}".split())))


def refuse_not_finite(directory: Path, names: Collection[str], field: str = "model.path") -> None:
    """Raise CheckpointError if there are names of tensors with NaN or infinity."""
    if names:
        remedy = "export the checkpoint again" if field == "model.path" else "save it again"
        raise unusable(directory, f"NaN or infinity in {len(names)} tensors: {some(names)}", remedy, field)


@contextmanager
def reading(directory: Path, file: Path, field: str = "model.path") -> Iterator[None]:
    """Turn errors about a safetensors file into a CheckpointError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise unusable(
            directory, f"{file.name} is truncated or damaged ({error})", "copy or export it again", field
        ) from error


def read_json(directory: Path, name: str, required: bool = True, field: str = "model.path") -> dict[str, Any]:
    """Read a JSON object; an absent file that is not required counts as empty.

    Raises:
        CheckpointError: a required file is absent, or the file holds no JSON object.
    """
    path = directory / name
    if not path.is_file():
        if required:
            raise unusable(directory, f"it has no {name}", "give a directory that save_pretrained wrote", field)
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(directory, f"{name} cannot be read as JSON ({error})", "copy it again", field) from error
    if not isinstance(raw, dict):
        raise unusable(directory, f"{name} is not a JSON object", "copy it again", field)
    return raw


def matching_files(directory: Path, patterns: Iterable[str]) -> list[Path]:
    """List the files directly in `directory` that match a pattern, sorted by name."""
    return sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})


def stamp_of(files: Iterable[Path]) -> str:
    """Return sha256 over names, sizes and times of change of files, hexadecimal.

    Raises OSError when one is gone.
    """
    seen = [(file.name, (status := file.stat()).st_size, status.st_mtime_ns) for file in files]
    return hashlib.sha256(repr(seen).encode()).hexdigest()
