"""Read the names, shapes and dtypes of tensors from headers of safetensors files."""

import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from ray_probe.checkpoints.files import INDEX, WEIGHTS, read_json, reading, unusable
from ray_probe.errors import some

_WIDTHS = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class TensorHeader:
    """The header of one tensor.

    Attributes:
        dtype: its name in safetensors, for example `F32`.
        shape: its shape.
        file: the file that holds it.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Bytes in the file; other dtypes (F8, I8, BOOL) take one byte an element."""
        return self.size * _WIDTHS.get(self.dtype, 1)


def weight_headers(directory: Path) -> dict[str, TensorHeader]:
    """Read the headers of the files that transformers loads, by tensor name.

    Raises:
        CheckpointError: files are missing, damaged, or contradict the index.
    """
    if (directory / WEIGHTS).is_file():
        return file_headers(directory, directory / WEIGHTS)
    if not (directory / INDEX).is_file():
        raise unusable(directory, f"it has no {WEIGHTS}", "export it with safetensors (pickle weights are not loaded)")
    indexed = _index(directory)
    found: dict[str, TensorHeader] = {}
    for name in sorted(set(indexed.values())):
        tensors = file_headers(directory, directory / name)
        if twice := sorted(found.keys() & tensors.keys()):
            raise unusable(
                directory, f"{some(twice)} is in {name} and in another file too", "copy the whole checkpoint"
            )
        found |= tensors
    if absent := sorted(key for key, name in indexed.items() if key not in found or found[key].file.name != name):
        raise unusable(
            directory,
            f"{INDEX} names {some(absent)}, which {indexed[absent[0]]} does not hold",
            "copy the whole checkpoint",
        )
    return found


def file_headers(directory: Path, file: Path, field: str = "model.path") -> dict[str, TensorHeader]:
    """Read the headers of one safetensors file. Raises CheckpointError."""
    with reading(directory, file, field), safe_open(file, framework="numpy") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: TensorHeader(s.get_dtype(), tuple(s.get_shape()), file) for name, s in slices.items()}


def _index(directory: Path) -> dict[str, str]:
    """Return tensor name to file name, of a checkpoint in several files."""
    indexed = read_json(directory, INDEX).get("weight_map")
    if not isinstance(indexed, dict) or not indexed or not all(isinstance(name, str) for name in indexed.values()):
        raise unusable(directory, f"{INDEX} has no weight_map of file names", "copy the whole checkpoint")
    names = sorted(set(indexed.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise unusable(directory, f"{INDEX} names {some(outside)}, which is not in the directory", "copy it there")
    if missing := [name for name in names if not (directory / name).is_file()]:
        raise unusable(directory, f"{INDEX} names {some(missing)}, which is not there", "copy the whole checkpoint")
    return indexed
