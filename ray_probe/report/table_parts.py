"""What the tables are made of: nothing but rich."""

import io
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
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

WIDTH = 100
"""Columns that tables keep to, and of what is no terminal."""
LEAST_WIDTH = 40
"""A terminal with fewer columns breaks lines by itself."""
MODES = ("none", "constant", "residual_mu", "regression")
SNR_RESOLVED = 1.0

Row = tuple[Cell, Cell, Cell, Cell]
"""Section, name, value, note: a figure with its unit is a value, words alone are a note."""


def rendered(said: RenderableType, stream: TextIO) -> str:
    """What rich would print on a stream: as wide as its terminal, without blanks at line ends where it is none."""
    kept = _Kept(stream)
    columns = shutil.get_terminal_size().columns if kept.isatty() else WIDTH  # rich takes 80 where TERM is dumb
    Console(file=kept, width=max(LEAST_WIDTH, columns)).print(said)
    text = kept.getvalue()
    return text if kept.isatty() else "\n".join(line.rstrip() for line in text.split("\n"))


class _Kept(io.StringIO):
    """What is printed, in memory, as it would be on a stream."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The stream's."""
        return self._stream.encoding or "utf-8"

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()


def page(*parts: RenderableType) -> RenderableType:
    """Parts one below the other, within the columns that all tables keep to."""
    return Constrain(Group(*parts), WIDTH)


def figures(rows: Sequence[Row]) -> RenderableType:
    """Rows of figures, a blank line before the first."""
    return below(Figures(rows)) if rows else Group()


def below(table: RenderableType) -> RenderableType:
    """A table with a blank line before it."""
    return Group(Text(), table)


def warned(lines: Iterable[str], title: str) -> list[RenderableType]:
    """A panel of warnings; nothing when there are none."""
    marked = [Prose(line, label=Text("! ")) for line in lines]
    if not marked:
        return []
    return [Panel(Group(*marked), title=title, border_style="bold yellow", box=box.HEAVY)]


def shown_path(path: str) -> str:
    """A path as people know it: from the current directory on where it lies inside."""
    there = Path(path)
    try:
        here = Path.cwd()
    except FileNotFoundError:  # a job's working directory goes with its connection
        return path
    return str(there.relative_to(here) if there.is_relative_to(here) else there)


def gradient_rows(gradient: Mapping[str, float | None], trace_note: str) -> list[Row]:
    """The gradient's norm, without its noise and with it, and what the noise is."""
    norm_sq, snr = gradient.get("norm_sq_debiased"), gradient.get("snr")
    return [
        ("Gradient", "norm_debiased", number(norm_debiased(gradient), 3), _root_note(norm_sq)),
        ("", "norm_raw", number(gradient.get("norm_raw")), "noise included, so too large"),
        ("", "norm_sq_debiased", number(norm_sq), "from products of different shards"),
        ("", "trace_cov", number(gradient.get("trace_cov")), trace_note),
        ("", "snr", number(snr, 3), _snr_note(snr)),
    ]


def norm_debiased(gradient: Mapping[str, float | None]) -> float | None:
    """Root of `norm_sq_debiased`, which results have had longer than its root; None where that is not above 0."""
    norm_sq = gradient.get("norm_sq_debiased")
    return math.sqrt(norm_sq) if norm_sq is not None and norm_sq > 0 else None


def duration(seconds: float) -> str:
    """A span of time in its two largest units: `2 h 13 min`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def count(amount: int, noun: str) -> str:
    """So many of something: `1 shard`, `2 shards`."""
    return f"{number(amount)} {noun}{'' if amount == 1 else 's'}"


def utc(iso: str) -> str:
    """An ISO 8601 time as people write it, in UTC."""
    return f"{datetime.fromisoformat(iso).astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _root_note(norm_sq: float | None) -> str:
    if norm_sq is None or is_missing(norm_sq):
        return ""
    return "root of norm_sq_debiased" if norm_sq > 0 else "norm_sq_debiased is not above 0"


def _snr_note(snr: float | None) -> str:
    if snr is None or is_missing(snr):
        return "needs two shards that share no prompt, and noise above 0"
    if snr <= 0:
        return "not above 0: the gradient is lost in the noise"
    return "norm_sq_debiased / (trace_cov / N)" if snr >= SNR_RESOLVED else "below 1: the direction is mostly noise"
