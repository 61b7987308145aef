"""What a checkpoint or adapter directory holds, read without loading a weight: JSON, headers, fingerprints.

Neither torch nor transformers is imported here: sizes and fingerprints are asked for where they are not.
"""

import hashlib
import json
import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ray_probe.checkpoints.weight_scan import WeightScan
from ray_probe.errors import CheckpointError, bad_value

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
CHECKPOINT_FILES = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja")
_BLOCK_BYTES = 1 << 20  # stays in a core's cache for the digest and the scan
# All that decides a result: trainers also write optimizer states and logs into the directory.
ADAPTER_FILES = (
    ADAPTER_CONFIG, ADAPTER_WEIGHTS, "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "*.model", "*.jinja",
)  # fmt: skip
BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class TensorHeader:
    """A tensor of a safetensors file, as the file's header has it.

    Attributes:
        dtype: safetensors' name of it, `F32` say.
        shape: its shape.
        file: where it lies.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes that it takes in the file; what is in no table takes one byte a number (F8, I8, BOOL)."""
        return self.size * BYTES.get(self.dtype, 1)


def refuse(directory: Path | str, remedy: str, field: str = "model.path") -> CheckpointError:
    """The error of a directory that cannot be used: one line with the field that named it."""
    return CheckpointError(bad_value(field, str(directory), " ".join(remedy.split())))


def some(names: Iterable[str]) -> str:
    """The first three of some names."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def read_json(directory: Path, name: str, required: bool = True, field: str = "model.path") -> dict[str, Any]:
    """A JSON object of the directory; empty where it is neither there nor required. Raises CheckpointError."""
    path = directory / name
    if not path.is_file():
        if required:
            raise refuse(directory, f"it has no {name}; give a directory that save_pretrained wrote", field)
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(directory, f"{name} cannot be read as JSON ({error}); copy it again", field) from error
    if not isinstance(raw, dict):
        raise refuse(directory, f"{name} is not a JSON object; copy it again", field)
    return raw


def weight_headers(directory: Path) -> dict[str, TensorHeader]:
    """The tensors of a checkpoint by name, from the files that transformers will load.

    Raises CheckpointError: files are missing, damaged, or not what the index says.
    """
    if (directory / WEIGHTS).is_file():
        return file_headers(directory, directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        raise refuse(directory, f"it has no {WEIGHTS}; export it with safetensors (pickle weights are not loaded)")
    indexed = _index(directory)
    found: dict[str, TensorHeader] = {}
    for name in sorted(set(indexed.values())):
        tensors = file_headers(directory, directory / name)
        twice = sorted(found.keys() & tensors.keys())
        if twice:
            raise refuse(directory, f"{some(twice)} is in {name} and in another file too; copy the whole checkpoint")
        found |= tensors
    absent = sorted(key for key, name in indexed.items() if key not in found or found[key].file.name != name)
    if absent:
        remedy = f"{INDEX} names {some(absent)}, which {indexed[absent[0]]} does not hold; copy the whole checkpoint"
        raise refuse(directory, remedy)
    return found


def file_headers(directory: Path, file: Path, field: str = "model.path") -> dict[str, TensorHeader]:
    """The tensors of one safetensors file. Raises CheckpointError when it is truncated or damaged."""
    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: TensorHeader(s.get_dtype(), tuple(s.get_shape()), file) for name, s in slices.items()}
    except (SafetensorError, OSError) as error:
        remedy = f"{file.name} is truncated or damaged ({error}); copy or export it again"
        raise refuse(directory, remedy, field) from error


def fingerprint(directory: Path, patterns: Iterable[str] = CHECKPOINT_FILES) -> str:
    """Sha256 over names and contents of the files that the patterns match, hexadecimal."""
    return read_through(directory, patterns).fingerprint


@dataclass(frozen=True)
class Contents:
    """What reading every byte of a directory has shown.

    Attributes:
        fingerprint: sha256 over names and contents of its files, hexadecimal.
        not_finite: names of the tensors that hold NaN or infinity.
    """

    fingerprint: str
    not_finite: tuple[str, ...]


def read_through(directory: Path, patterns: Iterable[str], weights: Collection[Path] = ()) -> Contents:
    """Read the files that the patterns match, once.

    Args:
        directory: where they lie.
        patterns: of their names.
        weights: the safetensors files among them whose numbers are looked at; their headers must be sound.
    """
    digest, not_finite = hashlib.sha256(), []
    for file in matching_files(directory, patterns):
        scan = WeightScan(file) if file in weights else None
        digest.update(file.name.encode() + b"\0" + _sha256(file, scan))
        not_finite += [] if scan is None else scan.not_finite
    return Contents(digest.hexdigest(), tuple(not_finite))


def _sha256(file: Path, scan: WeightScan | None) -> bytes:
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(block):
            digest.update(block[:count])
            if scan is not None:
                scan.feed(block[:count])
    return digest.digest()


def matching_files(directory: Path, patterns: Iterable[str]) -> list[Path]:
    """Files of the directory itself that a pattern matches, by name."""
    return sorted({file for pattern in patterns for file in directory.glob(pattern) if file.is_file()})


def _index(directory: Path) -> dict[str, str]:
    """Tensor name to file name, of a checkpoint in several files."""
    indexed = read_json(directory, INDEX).get("weight_map")
    if not isinstance(indexed, dict) or not indexed or not all(isinstance(name, str) for name in indexed.values()):
        raise refuse(directory, f"{INDEX} has no weight_map of file names; copy the whole checkpoint")
    names = sorted(set(indexed.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise refuse(directory, f"{INDEX} names {some(outside)}, which is not in the directory; copy it there")
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise refuse(directory, f"{INDEX} names {some(missing)}, which is not there; copy the whole checkpoint")
    return indexed
