"""The two policies of a comparison: both in memory, or one at a time."""

from collections.abc import Callable
from typing import Protocol

from ray_probe.sequence_processor import SequenceProcessor


class Policies(Protocol):
    """The processors of A (0) and of B (1): both in memory, or in turns."""

    def __getitem__(self, side: int, /) -> SequenceProcessor:
        """Return a processor; the other one may not be used any more."""


class InTurns:
    """Two policies of which one is in memory at a time.

    Args:
        bring_in: loads the policy of a side in the place of the other one.
    """

    def __init__(self, bring_in: Callable[[int], SequenceProcessor]) -> None:
        self._bring_in = bring_in
        self._side: int | None = None
        self._processor: SequenceProcessor | None = None

    def __getitem__(self, side: int, /) -> SequenceProcessor:
        """Return the processor of a side, loaded if need be."""
        if self._processor is None or side != self._side:
            self._side, self._processor = None, None  # frees the processor's hold on the other model
            self._processor = self._bring_in(side)
            self._side = side
        return self._processor
