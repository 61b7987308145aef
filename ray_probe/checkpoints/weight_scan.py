"""Find NaN and infinity in the bytes of a safetensors file as they are read.

Reading a checkpoint takes longer than scanning it, so the scan shares the read of the fingerprint.
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np


class _Bits(NamedTuple):
    """A floating-point dtype as unsigned integers.

    Attributes:
        dtype: of the integers.
        magnitude: mask of all bits but the sign.
        infinity: magnitudes from this on are not finite.
    """

    dtype: type[np.unsignedinteger]
    magnitude: int
    infinity: int


_BITS = {
    "F64": _Bits(np.uint64, 0x7FFF_FFFF_FFFF_FFFF, 0x7FF0_0000_0000_0000),
    "F32": _Bits(np.uint32, 0x7FFF_FFFF, 0x7F80_0000),
    "BF16": _Bits(np.uint16, 0x7FFF, 0x7F80),
    "F16": _Bits(np.uint16, 0x7FFF, 0x7C00),
}


class _Tensor(NamedTuple):
    name: str
    bits: _Bits
    start: int  # in the file, bytes
    stop: int


class WeightScan:
    """Scans one file, whose bytes come in order and in blocks of any size.

    Args:
        file: a safetensors file with a sound header.

    Attributes:
        not_finite: names of the tensors with NaN or infinity so far, in the order of the file.
    """

    def __init__(self, file: Path) -> None:
        self.not_finite: list[str] = []
        self._tensors = _tensors(file)
        self._place = 0  # of the next tensor
        self._at = 0  # bytes fed
        self._rest = b""  # of a number that the previous block cut

    def feed(self, block: memoryview) -> None:
        """Scan the next bytes of the file."""
        start, self._at = self._at, self._at + len(block)
        while self._place < len(self._tensors):
            tensor = self._tensors[self._place]
            if tensor.start >= self._at:
                return
            self._scan(tensor, block[max(0, tensor.start - start) : tensor.stop - start])
            if tensor.stop > self._at:
                return
            self._place, self._rest = self._place + 1, b""

    def _scan(self, tensor: _Tensor, piece: memoryview) -> None:
        if self.not_finite[-1:] == [tensor.name]:
            return
        width = np.dtype(tensor.bits.dtype).itemsize
        missing = (width - len(self._rest)) % width
        numbers: tuple[bytes | memoryview, ...] = (self._rest + bytes(piece[:missing]), piece[missing:])
        self._rest = b""
        for part in numbers:
            whole = len(part) // width * width
            self._rest += bytes(part[whole:])
            if _not_finite(part[:whole], tensor.bits):
                self.not_finite.append(tensor.name)
                return


def _not_finite(numbers: bytes | memoryview, bits: _Bits) -> bool:
    unsigned = np.frombuffer(numbers, bits.dtype)
    return unsigned.size > 0 and int((unsigned & bits.dtype(bits.magnitude)).max()) >= bits.infinity


def _tensors(file: Path) -> list[_Tensor]:
    """Return the floating-point tensors of more than 8 bits, in the order of the file."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    found = []
    for name, about in header.items():
        if (bits := _BITS.get(about.get("dtype"))) is not None:
            start, stop = about["data_offsets"]
            found.append(_Tensor(name, bits, 8 + length + start, 8 + length + stop))
    return sorted((tensor for tensor in found if tensor.stop > tensor.start), key=lambda tensor: tensor.start)
