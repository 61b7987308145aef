"""Text and tables that fit a terminal; no number is ever cut.

A table that is too wide drops its notes, then its secondary columns from the last on; then each row becomes a block of
lines. Widths are in terminal columns.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum

from rich import box
from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from ray_probe.report.signs import spelled

GAP = 2
INDENT = 2
LEAST_NOTE = 24
LABEL_SHARE = 0.4
"""A label that takes more of a line than this stands above its paragraph."""

# A value, its error and its per cent sign count as one word.
_SPACE = re.compile(r"(?<!±)(?<!\+-)\s+(?!±|\+-|%)")

_ASCII_RULE = box.Box("    \n    \n -- \n    \n    \n -- \n    \n    \n", ascii=True)

Cell = str | Text
Pair = tuple[Cell, Cell]


class Rank(IntEnum):
    """The order in which columns are left out: the highest rank first."""

    PRIMARY = 0
    SECONDARY = 1
    NOTE = 2


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: heading; a line break in it is kept.
        right: align to the right.
        style: of its cells.
        rank: order in which it is left out.
        least: least width where its cells may be broken into lines; None: they are never broken.
        prefers: width where there is room, so that tables below one another align.
    """

    title: str = ""
    right: bool = False
    style: str = ""
    rank: Rank = Rank.PRIMARY
    least: int | None = None
    prefers: int = 0


NOTE = Column(style="dim", rank=Rank.NOTE, least=LEAST_NOTE)


class FittedTable:
    """Rows under headings.

    Args:
        columns: from left to right; the first names the row.
        rows: a cell for each column.
        gap: columns between two columns.
    """

    headed = True

    def __init__(self, columns: Sequence[Column], rows: Iterable[Sequence[Cell]], gap: int = GAP) -> None:
        self._columns = list(columns)
        self._rows = [list(row) for row in rows]
        self._gap = gap

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the widest form that fits."""
        rows = [[_plain(cell, options.encoding) for cell in row] for row in self._rows]
        titles = [spelled(column.title, options.encoding) for column in self._columns]
        for places in self._forms():
            widths = self._widths(places, titles, rows, options.max_width)
            if widths is not None:
                yield self._table(places, widths, titles, rows, options.ascii_only)
                return
        for row in rows:
            yield from self._block(row, options)

    def _forms(self) -> Iterator[list[int]]:
        """Yield the columns that stay: all, then without notes, then without one more."""
        places = list(range(len(self._columns)))
        yield places
        for rank in (Rank.NOTE, Rank.SECONDARY):
            for place in [place for place in reversed(places) if self._columns[place].rank == rank]:
                places = [other for other in places if other != place]
                yield places

    def _widths(
        self, places: Sequence[int], titles: Sequence[str], rows: Sequence[Sequence[Text]], room: int
    ) -> list[int] | None:
        """Return a width for each of these columns; None when their cells do not fit."""
        room -= self._gap * (len(places) - 1)
        whole, least = [], []
        for place in places:
            column = self._columns[place]
            lines = [line for row in rows for line in row[place].plain.split("\n")]
            title = max(map(cell_len, titles[place].split("\n"))) if self.headed else 0
            needed = max([title, *map(cell_len, lines)])
            whole.append(max(needed, column.prefers))
            least.append(needed if column.least is None else min(needed, max(column.least, title)))
        if sum(least) > room:
            return None
        while sum(whole) > room:  # narrow the widest column that can be narrower
            place = max((p for p in range(len(whole)) if whole[p] > least[p]), key=lambda p: whole[p])
            whole[place] -= 1
        return whole

    def _table(
        self, places: Sequence[int], widths: Sequence[int], titles: Sequence[str], rows: Sequence[Sequence[Text]],
        ascii_only: bool,
    ) -> Table:  # fmt: skip
        table = Table(
            box=(_ASCII_RULE if ascii_only else box.SIMPLE_HEAD) if self.headed else None,
            show_header=self.headed, show_edge=False, pad_edge=False,
            padding=(0, self._gap - 1 if self.headed else self._gap, 0, 0),  # a headed table has a divider of one
        )  # fmt: skip
        for place, width in zip(places, widths, strict=True):
            column = self._columns[place]
            justify: JustifyMethod = "right" if column.right else "left"
            table.add_column(Text(titles[place]), justify=justify, style=column.style, width=width, overflow="fold")
        for row in rows:
            table.add_row(*(row[place] for place in places))
        return table

    def _block(self, row: Sequence[Text], options: ConsoleOptions) -> Iterator[RenderableType]:
        """Yield a row as lines: its name, then its figures, one a line."""
        heading, *_ = row
        if heading.plain:
            yield Prose(heading.plain, style=str(heading.style or self._columns[0].style))
        for label, value in self._pairs(row):
            yield from _beside(_plain(label, options.encoding), _plain(value, options.encoding), options.max_width)

    def _pairs(self, row: Sequence[Cell]) -> Iterator[Pair]:
        """Yield names and values of the figures of a row."""
        for column, cell in zip(self._columns[1:], row[1:], strict=True):
            if column.rank == Rank.PRIMARY:
                yield Text(column.title.replace("\n", " ")), cell


class Figures(FittedTable):
    """Rows of section, name, value and note, without headings."""

    headed = False

    def __init__(self, rows: Iterable[Sequence[Cell]]) -> None:
        columns = (Column(style="bold", prefers=9), Column(prefers=17), Column(prefers=18), NOTE)
        super().__init__(columns, rows)

    def _pairs(self, row: Sequence[Cell]) -> Iterator[Pair]:
        yield row[1], row[2]


class Prose:
    """A paragraph, broken between words; a value stays with its error.

    Args:
        text: its words.
        style: of the text.
        label: text before it, or above it where the terminal is narrow.
    """

    def __init__(self, text: str, style: str = "", label: Text | None = None) -> None:
        self._text = text
        self._style = style
        self._label = label if label is not None else Text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield one line after the other."""
        label, width = _plain(self._label, options.encoding), options.max_width
        below = label.cell_len > LABEL_SHARE * width
        indent = INDENT if below else label.cell_len
        lines = list(wrapped(spelled(self._text, options.encoding), width - indent))
        if below:
            label.rstrip()
            yield _line(label)
        for number, line in enumerate(lines):
            start = label if number == 0 and not below else Text(" " * indent)
            yield _line(Text.assemble(start, (line, self._style)))


def wrapped(text: str, width: int) -> Iterator[str]:
    """Break a text into lines; a word is broken where it is wider than a line."""
    line = ""
    for word in _SPACE.split(text):
        joined = f"{line} {word}" if line else word
        if cell_len(joined) <= width:
            line = joined
            continue
        if line:
            yield line
        *full, line = chop_cells(word, width) or [""]
        yield from full
    yield line


def _beside(label: Text, value: Text, width: int) -> Iterator[RenderableType]:
    """Yield a figure on the line of its label where there is room, else below it."""
    style = str(value.style)
    text = value.plain.replace("\n", " ")
    if INDENT + label.cell_len + GAP + cell_len(text) <= width:
        gap = " " * (GAP if label.plain else 0)
        yield _line(Text.assemble(" " * INDENT, label, gap, (text, style)))
        return
    if label.plain:
        yield _line(Text.assemble(" " * INDENT, label))
    for line in wrapped(text, width - 2 * INDENT):
        yield _line(Text.assemble(" " * 2 * INDENT, (line, style)))


def _line(text: Text) -> Text:
    text.no_wrap, text.overflow = True, "ignore"
    return text


def _plain(cell: Cell, encoding: str) -> Text:
    """Return a cell in signs that can be written.

    The style of its parts is lost where a sign is replaced.
    """
    text = cell.copy() if isinstance(cell, Text) else Text(cell)
    written = spelled(text.plain, encoding)
    return text if written == text.plain else Text(written, text.style)
