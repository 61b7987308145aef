"""Calls that arrive during a write share the next one: a group commit.

One caller works at a time. Items that arrive meanwhile wait, and one of their callers takes all of them next (DeWitt et
al., "Implementation techniques for main memory database systems", 1984).
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class GroupCommit(Generic[Item, Result]):
    """Carries out calls from many threads in groups, one group at a time.

    Args:
        work: carries out a group in order of arrival, and returns a result or an error for each item. An error that
            it raises goes to every caller of the group.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Sequence[Result | Exception]]) -> None:
        self._work = work
        self._waiting: list[tuple[Item, Future[Result]]] = []
        self._busy = False
        self._change = threading.Condition()

    def __call__(self, item: Item) -> Result:
        """Returns the result of this item once its group is done. Raises its error."""
        mine = Future[Result]()
        with self._change:
            self._waiting.append((item, mine))
            self._change.wait_for(lambda: mine.done() or not self._busy)
            group = [] if mine.done() else self._waiting
            if group:
                self._waiting, self._busy = [], True
        if group:
            self._carry_out(group)
        return mine.result()

    def _carry_out(self, group: list[tuple[Item, Future[Result]]]) -> None:
        answers: Sequence[Result | BaseException]
        try:
            answers = self._work([item for item, _ in group])
        except BaseException as error:  # no caller may be left waiting
            answers = [error] * len(group)
        with self._change:
            for (_, future), answer in zip(group, answers, strict=True):
                if isinstance(answer, BaseException):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
            self._busy = False
            self._change.notify_all()
