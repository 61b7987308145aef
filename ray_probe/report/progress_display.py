"""Shows a run's progress on stderr: a live bar on a terminal, else plain lines."""

import contextlib
import sys
import time
from collections.abc import Callable
from types import TracebackType

from rich import progress as rich_progress
from rich.console import Console
from rich.table import Column
from rich.text import Text

from ray_probe.run.progress import Progress

PLAIN_EVERY_S = 10.0
HALVES = 2  # of a shard: its record, then its gradient or change
BAR_CHARS = 6
BESIDE_STATUS = BAR_CHARS + len("100%") + len("0:00:00") + 4
"""Columns of bar, share, time and the gaps on a line of the live display."""


class ProgressDisplay:
    """Shows the snapshots that it receives; a context manager.

    A call stores a few numbers and returns; a thread draws a few times a second. Plain lines are written when a round
    ends, for every note, and else once in `PLAIN_EVERY_S` at most. The exit restores the terminal.

    Args:
        console: for the output; None: stderr.
        clock: monotonic seconds.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console(stderr=True)
        # Not console.is_terminal: FORCE_COLOR in a CI log must not write a live display into a file.
        self._live = self._console.file.isatty() and not self._console.is_dumb_terminal
        self._clock = clock
        self._last: Progress | None = None
        self._ended_round = -1
        self._reported_at = clock()
        self._bar: rich_progress.Progress | None = None
        self._task = rich_progress.TaskID(0)

    def __enter__(self) -> "ProgressDisplay":
        self._reported_at = self._clock()
        if self._live:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task("starting", total=None, status="")
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self.stop()
        elif self._last is not None and self._last.round > self._ended_round:
            self._report(self._last, " done" if kind is None else " stopped")

    def stop(self) -> None:
        """Restore the terminal."""
        bar, self._bar = self._bar, None
        if bar is not None:
            with contextlib.suppress(OSError):  # the terminal is closed
                bar.stop()

    def __call__(self, progress: Progress) -> None:
        """Show a snapshot; one of no round is a note alone."""
        if progress.note is not None:
            self._note(progress)
        if progress.rounds == 0:
            return
        if self._bar is not None:
            self._draw(self._bar, progress)
        else:
            self._write(progress)
        self._last = progress

    def _note(self, progress: Progress) -> None:
        in_round = progress.rounds != 0
        text = f"{_where(progress)}: {progress.note}" if in_round else str(progress.note)
        if self._bar is None:
            self._print(text)
            return
        with contextlib.suppress(OSError):
            self._bar.console.print(Text(text, "yellow" if in_round else ""))

    def _draw(self, bar: rich_progress.Progress, progress: Progress) -> None:
        total = None if progress.rounds is None else HALVES * progress.shards * progress.rounds
        room = self._console.width - BESIDE_STATUS - len(_where(progress))
        bar.update(
            self._task, description=_where(progress), completed=_halves_done(progress), total=total,
            status=_status(progress, room),
        )  # fmt: skip

    def _write(self, progress: Progress) -> None:
        last = self._last
        if last is not None and self._ended_round < last.round < progress.round:
            self._end(last)
        if progress.round > self._ended_round and progress.accumulated >= progress.shards:
            self._end(progress)
        elif self._clock() - self._reported_at >= PLAIN_EVERY_S:
            self._report(progress, "")

    def _end(self, progress: Progress) -> None:
        self._ended_round = progress.round
        self._report(progress, " done")

    def _report(self, progress: Progress, state: str) -> None:
        self._reported_at = self._clock()
        self._print(f"{_where(progress)}{state}: {_plain(progress)}")

    def _print(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a closed pipe must not end a run
            print(text, file=self._console.file, flush=True)


def _bar(console: Console) -> rich_progress.Progress:
    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        rich_progress.BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=BAR_CHARS)),
        rich_progress.TaskProgressColumn(table_column=Column(no_wrap=True)),
        rich_progress.TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
        rich_progress.TimeElapsedColumn(table_column=Column(no_wrap=True)),
        console=console,
        expand=True,
        refresh_per_second=5,
        redirect_stdout=sys.stdout.isatty(),  # a piped stdout must not end up here
    )


def _halves_done(progress: Progress) -> int:
    return HALVES * progress.round * progress.shards + progress.collected + progress.accumulated


def _where(progress: Progress) -> str:
    return f"round {progress.round + 1}" + ("" if progress.rounds is None else f"/{progress.rounds}")


def _speed(progress: Progress) -> str:
    return f"{progress.tokens / progress.elapsed_s:,.0f}" if progress.elapsed_s > 0 else "n/a"


def _beta(progress: Progress) -> str:
    return f"beta v{progress.version}" if progress.version else "no beta yet"


def _ratio(progress: Progress) -> str:
    return "n/a" if progress.variance_ratio is None else f"{progress.variance_ratio:.3g}"


def _status(progress: Progress, room: int) -> str:
    """Return the parts that fit, each whole: a number that is cut is another number."""
    missing = progress.actors_alive < progress.actors_asked
    actors = (f"actors {progress.actors_alive}/{progress.actors_asked}", 0 if missing else 2)
    parts = [
        (f"{_speed(progress)} tok/s", 1), (_beta(progress), 4), (f"var ratio {_ratio(progress)}", 3), actors,
    ]  # fmt: skip
    while parts and sum(len(text) + 2 for text, _ in parts) - 2 > room:
        parts.remove(max(parts, key=lambda part: part[1]))
    return "  ".join(f"[bold red]{text}[/]" if rank == 0 else text for text, rank in parts)


def _plain(progress: Progress) -> str:
    total = HALVES * progress.shards * (progress.rounds or 0)
    done = f"{100 * _halves_done(progress) // total} % of the run, " if total else ""
    return (
        f"records {progress.collected}/{progress.shards}, {progress.summed} {progress.accumulated}/{progress.shards}, "
        f"{done}{_speed(progress)} tokens/s, {_beta(progress)}, variance ratio {_ratio(progress)}, "
        f"actors {progress.actors_alive}/{progress.actors_asked}, {progress.elapsed_s:.0f} s"
    )
