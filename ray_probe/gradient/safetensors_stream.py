"""The head of a safetensors file of float64 tensors, so that files larger than memory are written and read in pieces.

A file is 8 bytes of length, a JSON object that says where each tensor lies, and the numbers, little-endian.
"""

import json
import struct
from collections.abc import Iterable
from typing import BinaryIO

NUMBER_BYTES = 8
MAX_HEADER_BYTES = 100_000_000

Place = tuple[str, tuple[int, ...], int, int]


def header(places: Iterable[Place]) -> bytes:
    """The head of a file with these tensors: name, shape, start and stop, in numbers, one right after the other."""
    entries = {
        name: {"dtype": "F64", "shape": list(shape), "data_offsets": [NUMBER_BYTES * start, NUMBER_BYTES * stop]}
        for name, shape, start, stop in places
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % NUMBER_BYTES)
    return struct.pack("<Q", len(text)) + text


def numbers_start(stream: BinaryIO, name: str, numbers: int) -> int:
    """Byte at which the one tensor `name`, a vector of so many numbers, starts.

    Raises:
        ValueError: the file holds something else, or is cut short; says what.
    """
    length = stream.read(8)
    if len(length) < 8 or (size := struct.unpack("<Q", length)[0]) > MAX_HEADER_BYTES:
        raise ValueError("it is no safetensors file")
    entries = json.loads(stream.read(size))
    entry = entries.get(name) if isinstance(entries, dict) else None
    if not isinstance(entry, dict) or entry.get("dtype") != "F64":
        raise ValueError(f"it holds no float64 tensor {name!r}")
    if entry["shape"] != [numbers]:
        raise ValueError(f"it holds a tensor of shape {entry['shape']}, the run's gradient has {numbers} numbers")
    start = 8 + int(size) + int(entry["data_offsets"][0])
    if stream.seek(0, 2) < start + NUMBER_BYTES * numbers:
        raise ValueError("it is cut short")
    return start
