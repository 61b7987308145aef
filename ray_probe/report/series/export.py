"""Series of checkpoints as CSV with every digit, and as Markdown."""

from collections.abc import Iterator, Sequence

from ray_probe.report.export import Value, csv_text, markdown_cell, markdown_table
from ray_probe.report.number_format import number, percent, with_error
from ray_probe.report.series.table import NOTE, heading, step_names, tags_text
from ray_probe.run.comparison.change import Figure
from ray_probe.run.series import Series, SeriesChange, SeriesPoint

POINT_FIGURES = ("entropy", "per_token", "length")
CHANGE_FIGURES = ("total", "pathwise", "visitation", "per_token", "length", "since_first")
POINT_COLUMNS = (
    "series", "step", "checkpoint", "tags", "measurements", "responses",
    *(column for name in POINT_FIGURES for column in (name, f"{name}_se")), "truncated", "snr", "parity_gap",
)  # fmt: skip
CHANGE_COLUMNS = (
    "change.first_step", "change.first_checkpoint", "change.measurement", "change.responses",
    *(column for name in CHANGE_FIGURES for column in (f"change.{name}", f"change.{name}_se")), "change.js",
    "change.effective_sample_share",
)  # fmt: skip


def series_csv(found: Sequence[Series]) -> str:
    """Return a line a checkpoint, with the comparison that ends at it.

    A checkpoint has a further line for each further comparison that ends at it.
    """
    rows = [line for series in found for point in series.points for line in _lines(series, point)]
    return csv_text((*POINT_COLUMNS, *CHANGE_COLUMNS), rows)


def _lines(series: Series, point: SeriesPoint) -> Iterator[list[Value]]:
    own: list[Value] = [
        series.name, point.step, point.checkpoint, tags_text(point.tags),
        ";".join(point.measurements), point.responses, *_pairs(point, POINT_FIGURES), point.truncated, point.snr,
        point.parity_gap,
    ]  # fmt: skip
    changes = [one for one in series.changes if (one.last_checkpoint, one.last_step) == (point.checkpoint, point.step)]
    if not changes:
        yield [*own, *([None] * len(CHANGE_COLUMNS))]
    for one in changes:
        yield [
            *own, one.first_step, one.first_checkpoint, one.measurement, one.responses, *_pairs(one, CHANGE_FIGURES),
            one.js, one.effective_sample_share,
        ]  # fmt: skip


def _pairs(holder: SeriesPoint | SeriesChange, names: Sequence[str]) -> Iterator[float | None]:
    """Yield each figure and its error."""
    for name in names:
        figure: Figure = getattr(holder, name)
        yield figure.value
        yield figure.se


def series_markdown(found: Sequence[Series]) -> str:
    """Return two tables a series with errors."""
    return "\n".join(_markdown(series) for series in found) + f"\n{NOTE}\n"


def _markdown(series: Series) -> str:
    points = [
        [
            markdown_cell(name),
            *(with_error(one.value, one.se) for one in (point.entropy, point.per_token, point.length)),
            percent(point.truncated, 1.0), number(point.snr, 3), number(point.parity_gap, 2), number(point.responses),
            markdown_cell(tags_text(point.tags)),
        ]
        for name, point in zip(step_names(series), series.points, strict=True)
    ]  # fmt: skip
    headings = (
        "step", "entropy, nats a response", "entropy, nats a token", "length, tokens", "cut", "snr", "parity, nats",
        "responses", "tags",
    )  # fmt: skip
    text = f"### {markdown_cell(heading(series))}\n\n{markdown_table(headings, points)}"
    if not series.changes:
        return text
    by_place = {(one.checkpoint, one.step): name for name, one in zip(step_names(series), series.points, strict=True)}
    changes = [
        [
            markdown_cell(by_place.get((one.first_checkpoint, one.first_step))),
            markdown_cell(by_place.get((one.last_checkpoint, one.last_step))),
            *(with_error(figure.value, figure.se, plus=True) for name in CHANGE_FIGURES
              for figure in [getattr(one, name)]),
        ]
        for one in series.changes
    ]  # fmt: skip
    units = ("from", "to", *(f"{name}, {'tokens' if name == 'length' else 'nats'}" for name in CHANGE_FIGURES))
    return f"{text}\n{markdown_table(units, changes)}"
