"""What the tables are made of: 100 columns, plain without colour; nothing but rich."""

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from ray_probe.report.numbers import is_missing, number

WIDTH = 100
MODES = ("none", "constant", "residual_mu", "regression")
SNR_RESOLVED = 1.0

Row = tuple[str | Text, str | Text, str | Text, str | Text]
"""Section, name, value, note."""


def page(*parts: RenderableType) -> RenderableType:
    """Parts one below the other, within the columns that all tables keep to."""
    return Constrain(Group(*parts), WIDTH)


def figures(rows: Sequence[Row]) -> RenderableType:
    """Rows of figures, a blank line before the first."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", min_width=9)
    table.add_column(min_width=17)
    table.add_column(min_width=18)
    table.add_column(style="dim")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in row))
    return Padding(table, (1 if rows else 0, 0, 0, 0))


def ruled(gap: int = 2) -> Table:
    """An empty table with a rule under its headings, and so many columns and one between its own."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))


def warned(lines: Iterable[str], title: str) -> list[RenderableType]:
    """A panel of warnings; nothing when there are none."""
    marked = [Text.assemble("! ", line) for line in lines]
    if not marked:
        return []
    return [Panel(Text("\n").join(marked), title=title, border_style="bold yellow", box=box.HEAVY)]


def shown_path(path: str) -> str:
    """A path as people know it: from the current directory on where it lies inside."""
    there = Path(path)
    try:
        here = Path.cwd()
    except FileNotFoundError:  # a job's working directory goes with its connection
        return path
    return str(there.relative_to(here) if there.is_relative_to(here) else there)


def gradient_rows(gradient: Mapping[str, float | None], trace_note: str) -> list[Row]:
    """The gradient's norm, with its noise and without, and what the noise is."""
    norm_sq, snr = gradient.get("norm_sq_debiased"), gradient.get("snr")
    return [
        ("Gradient", "norm", number(gradient.get("norm")), "noise included, so too large"),
        ("", "norm² de-biased", number(norm_sq), _root_note(norm_sq)),
        ("", "trace_cov", number(gradient.get("trace_cov")), trace_note),
        ("", "snr", number(snr, 3), _snr_note(snr)),
    ]


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
    return f"so the norm is about {number(math.sqrt(norm_sq), 3)}" if norm_sq > 0 else "not above 0"


def _snr_note(snr: float | None) -> str:
    if snr is None or is_missing(snr):
        return "needs two shards at least, and noise above 0"
    if snr <= 0:
        return "not above 0: the gradient is lost in the noise"
    return "norm² de-biased / (trace_cov / N)" if snr >= SNR_RESOLVED else "below 1: the direction is mostly noise"
