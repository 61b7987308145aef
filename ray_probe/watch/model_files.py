"""The files that transformers loads: which there are, and whether they are whole.

Standard library alone. JSON and the headers of safetensors files are read, and nothing is ever unpickled.
"""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIG, GENERATION = "config.json", "generation_config.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tiktoken.model")
"""A tokenizer has one of these."""
TOKENIZER_FILES = (
    *VOCABULARIES, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt",
    "*.model", "*.jinja",
)  # fmt: skip
ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS, GENERATION, *TOKENIZER_FILES)

Kind = Literal["model", "adapter", "pickle", "none"]
_UNFINISHED = re.compile(r"\.tmp.*|tmp-rank.*|model-\d{5}\.safetensors|.*\.safetensors\.tmp")
"""Names that files have while they are written: by safetensors, prime-rl and slime."""
_PICKLE = re.compile(r"adapter_model\.bin|pytorch_model(?:-.*)?\.bin(?:\.index\.json)?")
_MAX_HEADER_BYTES = 100_000_000  # that of safetensors


class UnusableError(Exception):
    """The directory's content can never be measured; the text says why."""


def read_object(path: Path) -> dict[str, Any] | None:
    """Return a JSON object; None where the file is absent, half-written or no object."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return raw if isinstance(raw, dict) else None


def read_integer(path: Path) -> int | None:
    """Return the integer that a tracker file holds; None where it holds no integer."""
    try:
        return int(path.read_text(encoding="utf-8").strip())
    except (OSError, ValueError):
        return None


def kind_of(directory: Path) -> Kind:
    """Return what the weights directly in a directory are, half-written or whole."""
    names = _names(directory)
    if ADAPTER_WEIGHTS in names or (ADAPTER_CONFIG in names and "adapter_model.bin" not in names):
        return "adapter"
    if any(name.endswith(".safetensors") for name in names) or INDEX in names:
        return "model"
    return "pickle" if any(map(_PICKLE.fullmatch, names)) else "none"


def missing_weights(directory: Path, kind: Kind) -> str | None:
    """Return which file of weights is not whole yet; None: all are.

    Raises:
        UnusableError: the index names files outside the directory.
    """
    if unfinished := sorted(filter(_UNFINISHED.fullmatch, _names(directory))):
        return f"{unfinished[0]} to get its name"
    if kind == "adapter":
        if read_object(directory / ADAPTER_CONFIG) is None:
            return f"a whole {ADAPTER_CONFIG}"
        return torn(directory / ADAPTER_WEIGHTS)
    if (directory / WEIGHTS).is_file():
        return torn(directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        return f"{WEIGHTS} or {INDEX}"
    indexed = (read_object(directory / INDEX) or {}).get("weight_map")
    if not isinstance(indexed, dict) or not indexed:
        return f"a whole {INDEX}"
    names = sorted({str(name) for name in indexed.values()})
    if outside := [name for name in names if not re.fullmatch(r"[^/\\]+\.safetensors", name)]:
        raise UnusableError(f"{INDEX} names {outside[0]!r}, which is no safetensors file beside it")
    return next((what for name in names if (what := torn(directory / name)) is not None), None)


def torn(path: Path) -> str | None:
    """Return what a safetensors file lacks by its size and header; None: nothing."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
                return f"the rest of {path.name} ({size} bytes)"
            header = json.loads(stream.read(length))
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        needed = 8 + length + max(ends, default=0)
    except FileNotFoundError:
        return path.name
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        return f"a whole header in {path.name}"
    return None if size == needed else f"the rest of {path.name} ({size} of {needed} bytes)"


def has_config(directory: Path) -> bool:
    """Return whether a directory has a config.json, and whole settings of generation."""
    whole = read_object(directory / CONFIG) is not None
    return whole and (not (directory / GENERATION).exists() or read_object(directory / GENERATION) is not None)


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory has a tokenizer whose JSON files can be read."""
    there = [directory / name for name in (*VOCABULARIES, "tokenizer_config.json") if (directory / name).is_file()]
    if not any(path.name in VOCABULARIES for path in there):
        return False
    return all(read_object(path) is not None for path in there if path.suffix == ".json")


def matching(directory: Path, patterns: Iterable[str]) -> list[Path]:
    """Return the files directly in a directory that match a pattern, by name."""
    return sorted({path for pattern in patterns for path in directory.glob(pattern) if path.is_file()})


def weight_files(directory: Path) -> list[Path]:
    """Return the files of whole weights that transformers reads."""
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    indexed = (read_object(directory / INDEX) or {}).get("weight_map", {})
    return [directory / INDEX, *(directory / name for name in sorted({str(name) for name in indexed.values()}))]


def _names(directory: Path) -> set[str]:
    with os.scandir(directory) as entries:
        return {entry.name for entry in entries if entry.is_file()}
