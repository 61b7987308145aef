"""The layout of the flat gradient: its parameters, and the buckets it moves in."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

BUCKET_NUMBERS = 8_000_000  # 32 MB in float32: a few fit any object store, and larger ones are no faster


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the trainable parameters, in the flat gradient's order."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Size of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Size of the flat gradient."""
        return sum(self.sizes)

    def ranges(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """Yields name, shape, start and stop of each parameter in the flat gradient."""
        start = 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            yield name, shape, start, start + size
            start += size

    def buckets(self, numbers: int = BUCKET_NUMBERS) -> list[tuple[int, int]]:
        """Returns start and stop of each bucket of at most `numbers` numbers."""
        return [(start, min(start + numbers, self.size)) for start in range(0, self.size, numbers)]
