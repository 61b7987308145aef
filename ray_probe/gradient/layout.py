"""Names and shapes of the trainable parameters, and where each lies in the flat gradient. No import but the standard.

The flat gradient is cut into buckets: what is moved, added and written at once.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

BUCKET_NUMBERS = 8_000_000  # 32 MB in float32: a few fit any object store, and larger ones are no faster


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the trainable parameters, in the order in which the flat gradient holds them."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of each parameter."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def size(self) -> int:
        """Numbers in the flat gradient."""
        return sum(self.sizes)

    def ranges(self) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """Name, shape, start and stop of each parameter in the flat gradient, in its order."""
        start = 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            yield name, shape, start, start + size
            start += size

    def buckets(self, numbers: int = BUCKET_NUMBERS) -> list[tuple[int, int]]:
        """Start and stop of each bucket of at most so many numbers; they tile the flat gradient."""
        return [(start, min(start + numbers, self.size)) for start in range(0, self.size, numbers)]
