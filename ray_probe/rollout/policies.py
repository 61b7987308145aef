"""The policies of a comparison and what memory they share.

Both are in memory, or one at a time, or both in turn with their midpoint.
"""

from collections.abc import Callable
from typing import Protocol

from ray_probe.rollout.midpoint import Midpoint
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


class PairOrMidpoint:
    """Two policies, whose memory their midpoint and the update take in turns.

    A round first scores under the two, then works at the midpoint: both are loaded again once a round. They are never
    restored from midpoint and update, which are rounded.

    Args:
        bring_in: loads the policy of a side into its own place.
        halve: puts the midpoint of two policies and the update in their place; neither may be used from then on.
    """

    def __init__(
        self,
        bring_in: Callable[[int], SequenceProcessor],
        halve: Callable[[SequenceProcessor, SequenceProcessor], Midpoint],
    ) -> None:
        self._bring_in, self._halve = bring_in, halve
        self._pair: tuple[SequenceProcessor, SequenceProcessor] | None = None
        self._midpoint: Midpoint | None = None

    def __getitem__(self, side: int, /) -> SequenceProcessor:
        """Return the processor of a side; a midpoint may not be used any more."""
        if self._pair is None:
            self._midpoint = None
            self._pair = self._bring_in(0), self._bring_in(1)
        return self._pair[side]

    def midpoint(self) -> Midpoint:
        """Return the midpoint; a processor of a side may not be used any more."""
        if self._midpoint is None:
            pair = self[0], self[1]
            self._pair = None  # an error on the way leaves neither, so that the next use loads
            self._midpoint = self._halve(*pair)
        return self._midpoint
