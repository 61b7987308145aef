"""The header of a safetensors file that is written in pieces."""

import json
import struct
from collections.abc import Iterable

NUMBER_BYTES = 8

Place = tuple[str, tuple[int, ...], int, int]


def header(places: Iterable[Place]) -> bytes:
    """Returns the first bytes of a file of adjacent float64 tensors.

    Args:
        places: name, shape, start and stop of each tensor, in numbers.
    """
    entries = {
        name: {"dtype": "F64", "shape": list(shape), "data_offsets": [NUMBER_BYTES * start, NUMBER_BYTES * stop]}
        for name, shape, start, stop in places
    }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % NUMBER_BYTES)
    return struct.pack("<Q", len(text)) + text
