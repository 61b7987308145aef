"""Callers who come while a disk is being written share the next write: one fsync for all. Standard library only.

One caller at a time works; what others bring meanwhile waits, and one of them takes all of it next (group commit, as
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
        self.error: BaseException | None = None


class GroupCommit(Generic[Item, Result]):
    """Calls from many threads, carried out in groups by one at a time.

    Args:
        work: carries out a group, in the order in which they came, and says for each its result or its error; what it
            raises itself is every caller's.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result | Exception]]) -> None:
        self._work = work
        self._waiting: list[_Waiting[Item, Result]] = []
        self._busy = False
        self._change = threading.Condition()

    def __call__(self, item: Item) -> Result:
        """The result for this item, once its group is through. Raises its error."""
        mine = _Waiting[Item, Result](item)
        with self._change:
            self._waiting.append(mine)
            self._change.wait_for(lambda: mine.done or not self._busy)
            group = [] if mine.done else self._waiting
            if group:
                self._waiting, self._busy = [], True
        if group:
            self._carry_out(group)
        if mine.error is not None:
            raise mine.error
        return mine.result

    def _carry_out(self, group: list[_Waiting[Item, Result]]) -> None:
        answers: Sequence[Result | BaseException]
        try:
            answers = self._work([one.item for one in group])
        except BaseException as error:  # nobody may be left waiting
            answers = [error] * len(group)
        with self._change:
            for one, answer in zip(group, answers, strict=True):
                if isinstance(answer, BaseException):
                    one.error = answer
                else:
                    one.result = answer
                one.done = True
            self._busy = False
            self._change.notify_all()
