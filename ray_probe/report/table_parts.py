"""Parts of the tables: pages, panels and rows of figures."""

import io
import math
import shutil
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from rich import box
from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.panel import Panel
from rich.text import Text

from ray_probe.report.column_layout import Cell, Figures, Prose
from ray_probe.report.number_format import is_missing, number
from ray_probe.run.result import Gradient

WIDTH = 100
"""Columns of a table at most, and of a stream that is no terminal."""
LEAST_WIDTH = 40
"""A terminal with fewer columns breaks lines itself."""
SNR_RESOLVED = 1.0

Row = tuple[Cell, Cell, Cell, Cell]
"""Section, name, value with its unit, note."""


def rendered(said: RenderableType, stream: TextIO) -> str:
    """Return what rich would print; no terminal gets blanks at line ends."""
    kept = _Kept(stream)
    columns = shutil.get_terminal_size().columns if kept.isatty() else WIDTH  # rich takes 80 where TERM is dumb
    Console(file=kept, width=max(LEAST_WIDTH, columns)).print(said)
    text = kept.getvalue()
    return text if kept.isatty() else "\n".join(line.rstrip() for line in text.split("\n"))


class _Kept(io.StringIO):
    """A stream in memory that takes encoding and terminal from another one."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()


def page(*parts: RenderableType) -> RenderableType:
    """Return the parts one below the other, `WIDTH` columns wide at most."""
    return Constrain(Group(*parts), WIDTH)


def figures(rows: Sequence[Row]) -> RenderableType:
    """Return rows of figures, a blank line before the first."""
    return below(Figures(rows)) if rows else Group()


def below(table: RenderableType) -> RenderableType:
    """Return a table with a blank line before it."""
    return Group(Text(), table)


def warned(lines: Iterable[str], title: str) -> list[RenderableType]:
    """Return a panel of warnings, or nothing without a warning."""
    marked = [Prose(line, label=Text("! ")) for line in lines]
    if not marked:
        return []
    return [Panel(Group(*marked), title=title, border_style="bold yellow", box=box.HEAVY)]


def shown_path(path: str) -> str:
    """Return a path relative to the current directory where it lies inside."""
    there = Path(path)
    try:
        here = Path.cwd()
    except FileNotFoundError:  # a job's working directory goes with its connection
        return path
    return str(there.relative_to(here) if there.is_relative_to(here) else there)


def gradient_rows(gradient: Gradient, trace_note: str) -> list[Row]:
    """Return the gradient's norm without its noise and with it, and the noise."""
    norm_sq, snr = gradient.norm_sq_debiased, gradient.snr
    return [
        ("Gradient", "norm_debiased", number(norm_debiased(gradient), 3), _root_note(norm_sq)),
        ("", "norm_raw", number(gradient.norm_raw), "noise included, so too large"),
        ("", "norm_sq_debiased", number(norm_sq), "from products of independent commits or shards"),
        ("", "trace_cov", number(gradient.trace_cov), trace_note),
        ("", "snr", number(snr, 3), gradient.why_null or _snr_note(snr)),
    ]


def norm_debiased(gradient: Gradient) -> float | None:
    """Return the root of `norm_sq_debiased`; None where that is not above 0."""
    # Results of 0.1.1 lack the root itself.
    norm_sq = gradient.norm_sq_debiased
    return math.sqrt(norm_sq) if norm_sq is not None and norm_sq > 0 else None


def duration(seconds: float) -> str:
    """Return a span of time in its two largest units: `2 h 13 min`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def utc(iso: str) -> str:
    """Return an ISO 8601 time as people write it, in UTC."""
    return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _root_note(norm_sq: float | None) -> str:
    if norm_sq is None or is_missing(norm_sq):
        return ""
    return "root of norm_sq_debiased" if norm_sq > 0 else "norm_sq_debiased is not above 0"


def _snr_note(snr: float | None) -> str:
    if snr is None or is_missing(snr):
        return "needs noise above 0"
    if snr <= 0:
        return "not above 0: the gradient is lost in the noise"
    return "norm_sq_debiased / (trace_cov / N)" if snr >= SNR_RESOLVED else "below 1: the direction is mostly noise"
