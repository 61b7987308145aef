"""Measurements of a service as CSV and as Markdown."""

from collections.abc import Iterable

from ray_probe.controller.replies import MeasurementInfo
from ray_probe.report.export import csv_text, entropy_figures, gradient_figures, markdown_cell, markdown_table
from ray_probe.report.number_format import number, with_error
from ray_probe.report.table_parts import norm_debiased
from ray_probe.run.result import Entropy, Gradient

_LISTED = ("id", "state", "checkpoint", "adapter", "rounds", "sequences")
_ENDED = ("submitted", "started", "finished", "exit_code", "cause", "directory")


def listing_csv(items: Iterable[MeasurementInfo]) -> str:
    """Return a line a measurement."""
    columns = (*_LISTED, *entropy_figures(Entropy()), *gradient_figures(Gradient()), *_ENDED)
    return csv_text(columns, map(_line, items))


def _line(item: MeasurementInfo) -> list[str | int | float | None]:
    figures = entropy_figures(item.entropy or Entropy()) | gradient_figures(item.gradient or Gradient())
    first, last = ([getattr(item, key) for key in keys] for keys in (_LISTED, _ENDED))
    return [*first, *figures.values(), *last]


def listing_markdown(items: Iterable[MeasurementInfo]) -> str:
    """Return a row a measurement."""
    rows = []
    for item in items:
        entropy, gradient = item.entropy or Entropy(), item.gradient or Gradient()
        per_sequence = with_error(entropy.per_sequence, entropy.per_sequence_se)
        figures = (per_sequence, number(norm_debiased(gradient), 3), number(gradient.snr, 3))
        rows.append((*(markdown_cell(getattr(item, key)) for key in _LISTED), *figures))
    return markdown_table((*_LISTED, "entropy.per_sequence, nats", "gradient.norm_debiased", "gradient.snr"), rows)
