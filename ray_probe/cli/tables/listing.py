"""Measurements of a service as CSV and as Markdown."""

from collections.abc import Iterable

from ray_probe.controller.replies import MeasurementInfo
from ray_probe.report.export import csv_text, entropy_figures, gradient_figures, markdown_cell, markdown_table
from ray_probe.report.number_format import number, with_error
from ray_probe.report.series.table import tags_text
from ray_probe.report.table_parts import norm_debiased
from ray_probe.run.comparison.change import ChangeFigure
from ray_probe.run.result import Entropy, Gradient

_LISTED = ("id", "state", "checkpoint", "adapter", "against", "rounds", "sequences")
_CHANGE = ("change.total", "change.total_se")
_SERIES = ("series", "step", "tags")
_ENDED = ("submitted", "started", "finished", "exit_code", "cause", "directory")


def listing_csv(items: Iterable[MeasurementInfo]) -> str:
    """Return a line a measurement."""
    columns = (*_LISTED, *_CHANGE, *entropy_figures(Entropy()), *gradient_figures(Gradient()), *_ENDED, *_SERIES)
    return csv_text(columns, map(_line, items))


def _line(item: MeasurementInfo) -> list[str | int | float | None]:
    figures = entropy_figures(item.entropy or Entropy()) | gradient_figures(item.gradient or Gradient())
    first, last = ([getattr(item, key) for key in keys] for keys in (_LISTED, _ENDED))
    change = item.change or ChangeFigure()
    return [*first, change.value, change.se, *figures.values(), *last, item.series, item.step, tags_text(item.tags)]


def listing_markdown(items: Iterable[MeasurementInfo]) -> str:
    """Return a row a measurement; columns of series where one belongs to any."""
    rows, items = [], tuple(items)
    in_series = any(item.series is not None or item.step is not None for item in items)
    for item in items:
        entropy, gradient = item.entropy or Entropy(), item.gradient or Gradient()
        per_sequence = with_error(entropy.per_sequence, entropy.per_sequence_se)
        changed = "" if item.change is None else with_error(item.change.value, item.change.se, plus=True)
        figures = (changed, per_sequence, number(norm_debiased(gradient), 3), number(gradient.snr, 3))
        place = (item.series, item.step, tags_text(item.tags)) if in_series else ()
        rows.append((*(markdown_cell(getattr(item, key)) for key in _LISTED), *figures, *map(markdown_cell, place)))
    figures_of = ("change.total, nats", "entropy.per_sequence, nats", "gradient.norm_debiased", "gradient.snr")
    return markdown_table((*_LISTED, *figures_of, *(_SERIES if in_series else ())), rows)
