"""Series of checkpoints as tables for a terminal."""

from collections.abc import Mapping, Sequence

from rich.console import RenderableType

from ray_probe.report.column_layout import NOTE as NOTE_COLUMN
from ray_probe.report.column_layout import Cell, Column, FittedTable, Prose, Rank
from ray_probe.report.number_format import NOT_AVAILABLE, count, number, percent, with_error
from ray_probe.report.table_parts import below, page
from ray_probe.run.comparison.chain import names_of
from ray_probe.run.comparison.change import Figure
from ray_probe.run.series import Series, SeriesChange, SeriesPoint

NOTE = "± one standard error, prompts as clusters; errors of sums come from the sums of each prompt over the steps"
NONE_YET = "no series yet; measure the first checkpoint: probe CHECKPOINT --series NAME --step N"
POINTS = (
    Column("step", least=8), Column("entropy,\nnats a response", right=True),
    Column("entropy,\nnats a token", right=True), Column("length,\ntokens", right=True),
    Column("cut", right=True, rank=Rank.SECONDARY),
    Column("snr", right=True, rank=Rank.SECONDARY), Column("parity,\nnats", right=True, rank=Rank.SECONDARY),
    Column("responses", right=True, rank=Rank.SECONDARY), NOTE_COLUMN,
)  # fmt: skip
CHANGES = (
    Column("step", least=8), Column("change,\nnats a response", right=True),
    Column("pathwise", right=True, rank=Rank.SECONDARY), Column("visitation", right=True, rank=Rank.SECONDARY),
    Column("since the\nfirst", right=True), Column("change,\nnats a token", right=True, rank=Rank.SECONDARY),
)  # fmt: skip


def series_tables(found: Sequence[Series]) -> RenderableType:
    """Return the tables of series, one series below the other."""
    if not found:
        return Prose(NONE_YET)
    return page(*(part for one in found for part in _of_one(one)), Prose(NOTE, "dim"))


def _of_one(series: Series) -> list[RenderableType]:
    names = step_names(series)
    parts: list[RenderableType] = [Prose(heading(series), "bold")]
    if series.points:
        rows = [_point(name, point) for name, point in zip(names, series.points, strict=True)]
        parts.append(below(FittedTable(POINTS, rows, gap=1)))
    if series.changes:
        by_place = dict(zip(((one.checkpoint, one.step) for one in series.points), names, strict=True))
        parts.append(below(FittedTable(CHANGES, [_change(by_place, one) for one in series.changes], gap=1)))
    return [*parts, Prose("")]


def heading(series: Series) -> str:
    """Return the name of a series with what it holds."""
    said = [count(len(series.points), "checkpoint"), count(len(series.changes), "comparison")]
    said += [f"{series.open} to be measured"] if series.open else []
    said += [f"{count(series.failed, 'measurement')} failed or cancelled"] if series.failed else []
    return f"{series.name}: {', '.join(said)}"


def step_names(series: Series) -> list[str]:
    """Return a short name of each point: its step, else the end of its path."""
    names = names_of([point.checkpoint for point in series.points])
    return [
        name if point.step is None else str(point.step) for name, point in zip(names, series.points, strict=True)
    ]


def tags_text(tags: Mapping[str, str]) -> str:
    """Return labels as one text."""
    return ";".join(f"{key}={value}" for key, value in tags.items())


def _point(name: str, point: SeriesPoint) -> list[Cell]:
    return [
        name, _plain(point.entropy), _plain(point.per_token), _plain(point.length), percent(point.truncated, 1.0),
        number(point.snr, 3), number(point.parity_gap, 2), number(point.responses),
        tags_text(point.tags),
    ]  # fmt: skip


def _change(names: dict[tuple[str, int | None], str], change: SeriesChange) -> list[Cell]:
    first = names.get((change.first_checkpoint, change.first_step), NOT_AVAILABLE)
    last = names.get((change.last_checkpoint, change.last_step), NOT_AVAILABLE)
    found = (change.total, change.pathwise, change.visitation, change.since_first, change.per_token)
    return [f"{first} to\n{last}", *(with_error(one.value, one.se, plus=True) for one in found)]


def _plain(figure: Figure) -> str:
    return with_error(figure.value, figure.se)
