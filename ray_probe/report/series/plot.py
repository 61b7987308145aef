"""The plot of series over the trainer's steps, one column a series."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ray_probe.core.arrays import Array
from ray_probe.report.plot_style import BLUE, INK, PURPLE, SMALL, VERMILION, dress, floats, nothing
from ray_probe.report.series.table import step_names
from ray_probe.run.comparison.change import Figure as Estimate
from ray_probe.run.series import Series, SeriesPoint

FEW = 6
"""Checkpoints up to which each is named on the axis."""


@dataclass(frozen=True)
class _Row:
    """A row of the plot that shows a figure of each checkpoint."""

    label: str
    of: Callable[[SeriesPoint], Estimate]


ROWS = (
    _Row("entropy, nats\na response", lambda point: point.entropy),
    _Row("entropy, nats\na token", lambda point: point.per_token),
    _Row("length,\ntokens", lambda point: point.length),
    _Row("signal over\nnoise", lambda point: Estimate(point.snr)),
    _Row("share cut", lambda point: Estimate(point.truncated)),
    _Row("parity gap,\nnats", lambda point: Estimate(point.parity_gap)),
)
CHANGE_ROW = 2
"""Place of the change by step, between the entropies and the rest."""


def series_figure(found: Sequence[Series]) -> Figure:
    """Draw series side by side: entropies with bands, changes by part, and checks."""
    columns, rows = max(1, len(found)), len(ROWS) + 1
    figure = Figure(figsize=(0.6 + 6.6 * columns, 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex="col", sharey="row", squeeze=False)
    if not found:
        grid[0][0].set_title("no series yet")
    for column, series in enumerate(found):
        _draw(figure, [grid[row][column] for row in range(rows)], series, named=column == 0)
    figure.align_ylabels()
    return figure


def _draw(figure: Figure, axes: Sequence[Axes], series: Series, named: bool) -> None:
    """Draw one series into a column."""
    labels = [row.label for row in ROWS]
    labels.insert(CHANGE_ROW, "change of entropy,\nnats a response")
    for number, (own, label) in enumerate(zip(axes, labels, strict=True)):
        dress(own, series.name if number == 0 else "", "", label if named else "")
        own.yaxis.label.set_fontsize(SMALL)
    if not series.points:
        nothing(figure, axes[0], "no checkpoint is measured yet")
        return
    at, by_steps = _places(series)
    for own, row in zip([*axes[:CHANGE_ROW], *axes[CHANGE_ROW + 1 :]], ROWS, strict=True):
        _band(own, at, [row.of(point) for point in series.points])
    _changes(axes[CHANGE_ROW], at, series)
    last = axes[-1]
    last.set_xlabel("step of the trainer" if by_steps else "checkpoint, in the order of submission", fontsize=11)
    if not by_steps or len(at) <= FEW:
        last.set_xticks(at, step_names(series))
    else:
        last.xaxis.set_major_locator(MaxNLocator(integer=True))


def _places(series: Series) -> tuple[Array, bool]:
    """Return where the points lie on the axis, and whether that is their steps."""
    steps = [point.step for point in series.points]
    known = all(step is not None for step in steps)
    return floats(steps if known else range(1, len(steps) + 1)), known


def _band(axes: Axes, at: Array, figures: Sequence[Estimate]) -> None:
    """Draw known figures as a line with a band of one standard error."""
    values, errors = floats(one.value for one in figures), floats(one.se for one in figures)
    known = np.isfinite(values)
    if not known.any():
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center", color="#888888")
        return
    x, y, se = at[known], values[known], np.nan_to_num(errors[known])
    axes.fill_between(x, y - se, y + se, color=PURPLE, alpha=0.2, linewidth=0)
    axes.plot(x, y, "o-", color=PURPLE, markersize=4)
    axes.margins(y=0.15)


def _changes(axes: Axes, at: Array, series: Series) -> None:
    """Draw the parts of each change as bars in the middle between its checkpoints."""
    place = {(one.checkpoint, one.step): x for one, x in zip(series.points, at.tolist(), strict=True)}
    ends = [
        (place[one.first_checkpoint, one.first_step], place[one.last_checkpoint, one.last_step])
        for one in series.changes
    ]
    axes.axhline(0.0, color=INK, linewidth=0.9)
    if not ends:
        return
    middle = floats((first + last) / 2.0 for first, last in ends)
    width = floats(0.3 * abs(last - first) for first, last in ends)
    for side, name, color in ((-0.55, "pathwise", BLUE), (0.55, "visitation", VERMILION)):
        parts = [getattr(one, name) for one in series.changes]
        values, errors = floats(part.value for part in parts), floats(part.se for part in parts)
        axes.bar(middle + side * width, values, width=width, color=color, label=name)
        axes.errorbar(middle + side * width, values, errors, fmt="none", ecolor=INK, elinewidth=1.0, capsize=2)
    totals = [one.total for one in series.changes]
    axes.errorbar(
        middle, floats(one.value for one in totals), floats(one.se for one in totals), fmt="D", color=PURPLE,
        markersize=4, elinewidth=1.2, capsize=3, label="total",
    )  # fmt: skip
    axes.legend(frameon=False, fontsize=SMALL, ncols=3, loc="best")
    axes.margins(y=0.2)
