"""Write a report's figures as plain HTML tables, for a reader without scripts."""

from collections.abc import Iterable, Sequence
from html import escape

from ray_probe.page.words import Words
from ray_probe.report.number_format import number, percent, with_error
from ray_probe.run.comparison.chain import names_of
from ray_probe.run.comparison.change import Figure
from ray_probe.run.series import Series, SeriesChange, SeriesPoint

POINT_COLUMNS = ("step", "checkpoint", "responses", "entropy, nats a response", "entropy, nats a token",
                 "length, tokens", "cut at the cap")  # fmt: skip
CHANGE_COLUMNS = ("from", "to", "change, nats a response", "pathwise", "visitation", "since the first")


def fallback(title: str, entries: Iterable[tuple[str, Words]], series: Sequence[Series]) -> str:
    """Return the HTML of a report's body: what was found, warnings, and every figure.

    Args:
        title: of the report.
        entries: name and words of each measurement.
        series: shown first.
    """
    parts = [f"<h1>{escape(title)}</h1>", *map(_series, series), *(_entry(name, words) for name, words in entries)]
    return "\n".join(parts)


def _entry(name: str, words: Words) -> str:
    todo = () if words.advice is None else (f"To do: {words.advice}",)
    lines = [*words.lines, words.verdict, *words.caveats, *todo]
    said = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f"<h2>{escape(name)}: {escape(words.title)}</h2>{said}{_table(('', 'figure', 'value', 'note'), words.rows)}"


def _series(series: Series) -> str:
    names = names_of([point.checkpoint for point in series.points])
    points = [_point(name, point) for name, point in zip(names, series.points, strict=True)]
    changes = map(_change, series.changes)
    return (
        f"<h2>Series {escape(series.name)}</h2>{_table(POINT_COLUMNS, points)}{_table(CHANGE_COLUMNS, changes)}"
        "<p>± one standard error, prompts as clusters</p>"
    )


def _point(name: str, point: SeriesPoint) -> list[str]:
    figures = (point.entropy, point.per_token, point.length)
    return [_step(point.step), name, number(point.responses), *map(_plain, figures), percent(point.truncated, 1)]


def _change(change: SeriesChange) -> list[str]:
    figures = (change.total, change.pathwise, change.visitation, change.since_first)
    first, last = (change.first_step, change.first_checkpoint), (change.last_step, change.last_checkpoint)
    places = [_name(checkpoint) if step is None else f"step {step}" for step, checkpoint in (first, last)]
    return [*places, *(with_error(figure.value, figure.se, plus=True) for figure in figures)]


def _plain(figure: Figure) -> str:
    return with_error(figure.value, figure.se)


def _name(checkpoint: str) -> str:
    """Return the last two parts of a checkpoint's path."""
    return "/".join(checkpoint.split("/")[-2:])


def _step(step: int | None) -> str:
    return "" if step is None else str(step)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
