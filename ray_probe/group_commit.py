"""Callers who come while a disk is being written share the next write: one fsync for all. Standard library only.

One thread at a time works; what others bring meanwhile waits, and whoever is next takes all of it (group commit, as
databases do it: DeWitt et al., "Implementation techniques for main memory database systems", 1984).
"""

import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class _Waiting(Generic[Item, Result]):
    """One caller's item, and in the end its result or error."""

    def __init__(self, item: Item) -> None:
        self.item = item
        self.done = False
        self.result: Result
        self.error: Exception | None = None


class GroupCommit(Generic[Item, Result]):
    """Calls from many threads, carried out in groups by one at a time.

    Args:
        work: carries out a group, in the order in which they came, and says for each its result or its error; what it
            raises itself is every caller's.
        alone: held while it works.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result | Exception]], alone: threading.RLock) -> None:
        self._work = work
        self._alone = alone
        self._waiting: list[_Waiting[Item, Result]] = []
        self._door = threading.Lock()

    def __call__(self, item: Item) -> Result:
        """The result for this item, once its group is through. Raises its error."""
        mine = _Waiting[Item, Result](item)
        with self._door:
            self._waiting.append(mine)
        with self._alone:
            if not mine.done:
                self._carry_out()
        if mine.error is not None:
            raise mine.error
        return mine.result

    def _carry_out(self) -> None:
        with self._door:
            group, self._waiting = self._waiting, []
        try:
            answers = self._work([one.item for one in group])
        except Exception as error:
            answers = [error] * len(group)
        for one, answer in zip(group, answers, strict=True):
            if isinstance(answer, Exception):
                one.error = answer
            else:
                one.result = answer
            one.done = True
