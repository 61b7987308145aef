"""The look of the plots, without global state: colours, axes, captions."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.modes import Mode

NAME_CHARS = 28
CHECKPOINT_CHARS = 30
SMALL = 9.5
MANY_ROUNDS = 30
WIDE_DECADES = 3.0
# Okabe and Ito's palette, which colour-blind readers can tell apart; the markers differ in grey too.
MODE_COLOR: dict[Mode, str] = {
    "none": "#7F7F7F", "constant": "#E69F00", "residual_mu": "#009E73", "regression": "#0072B2",
}  # fmt: skip
MODE_MARKER: dict[Mode, str] = {"none": "o", "constant": "s", "residual_mu": "^", "regression": "D"}
BLUE, VERMILION, PURPLE, INK, FAINT = "#0072B2", "#D55E00", "#A0457E", "#222222", "#888888"


def canvas(title: str, x_label: str, y_label: str) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes."""
    figure = Figure(figsize=(7.2, 4.5), layout="constrained")
    axes = figure.add_subplot()
    dress(axes, title, x_label, y_label)
    return figure, axes


def dress(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Set title and labels, a faint grid behind the data, no box."""
    axes.set_title(title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=19 if title else None)
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.tick_params(labelsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="both", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)


def caption(axes: Axes, text: str) -> None:
    """Write a faint line under the title that says what was measured."""
    axes.text(0.0, 1.0, text, transform=axes.transAxes, va="bottom", fontsize=8, color=FAINT, linespacing=1.6)


def nothing(figure: Figure, axes: Axes, why: str) -> Figure:
    """Write into an empty figure why there is nothing to draw."""
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", va="center", fontsize=13, color=FAINT)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    return figure


def floats(values: Iterable[float | None]) -> Array:
    """Return values as float64 [n], NaN for None."""
    return np.array([np.nan if value is None else value for value in values], dtype=np.float64)


def closed(heights: Array) -> Array:
    """Return heights of n bins as n + 1 points of a step from edge to edge."""
    return np.append(heights, heights[-1:])


def log_if_wide(axes: Axes, values: Array, widest: float) -> bool:
    """Make the y axis logarithmic where the values' ratio passes `widest`.

    Else it is linear from 0.
    Returns whether it is logarithmic.
    """
    known = values[np.isfinite(values)]
    wide = bool(known.size and known.min() > 0 and known.max() > widest * known.min())
    if wide:
        axes.set_yscale("log")
        many = math.log10(known.max() / known.min()) > WIDE_DECADES
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if many else (1.0, 2.0, 5.0), numticks=9))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)
    return wide


def room_above(axes: Axes, heights: Array, log: bool) -> None:
    """Leave room for labels above bars.

    On a logarithmic axis the bars start a factor 3 below the lowest.
    """
    known = heights[np.isfinite(heights)]
    if log:
        low, high = known.min() / 3, known.max()
        axes.set_ylim(low, high * (high / low) ** 0.2)
    elif known.size and known.max() > 0:
        axes.set_ylim(0, 1.18 * known.max())


def symlog(axes: Axes, smallest: float, largest: float) -> None:
    """Make the x axis symmetric logarithmic for these absolute values, with few ticks."""
    first, last = math.floor(math.log10(smallest)), math.floor(math.log10(largest))
    axes.set_xscale("symlog", linthresh=10.0**first, linscale=0.5)
    powers = range(last, first, -max(1, math.ceil((last - first) / 3)))
    ticks = sorted([0.0, *(sign * 10.0**power for power in powers for sign in (-1, 1))])
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def in_background(axes: Axes, counts: Array, edges: Array, label: str) -> None:
    """Draw faint counts by bin behind the data, in the lower third, on a second axis."""
    behind = axes.twinx()
    behind.stairs(counts, edges, fill=True, color="#BBBBBB", alpha=0.35, linewidth=0)
    behind.set_ylabel(label, color=FAINT, fontsize=SMALL, loc="bottom")
    behind.set_ylim(0, 3.2 * counts.max())
    ticks = MaxNLocator(2, integer=True).tick_values(0, counts.max())
    behind.set_yticks([tick for tick in ticks if 0 <= tick <= counts.max()])
    behind.tick_params(colors=FAINT, length=0, labelsize=SMALL)
    behind.spines[:].set_visible(False)
    axes.set_zorder(behind.get_zorder() + 1)
    axes.patch.set_visible(False)


def whole_rounds(axes: Axes, rounds: Sequence[int]) -> None:
    """Set ticks at whole rounds only, with room on both sides."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if rounds:
        axes.set_xlim(min(rounds) - 0.5, max(rounds) + 0.5)


def marker_size(rounds: Sequence[int]) -> float:
    """Return the size of a marker in points, small where there are many rounds."""
    return 6.5 if len(rounds) <= MANY_ROUNDS else 3.0


def end_of(name: str, chars: int) -> str:
    """Return the end of a long name: the end of a path says more than its beginning."""
    return name if len(name) <= chars else f"...{name[3 - chars :]}"


def short(name: str) -> str:
    """Return a name cut in its middle so that it fits beside an axis."""
    half = (NAME_CHARS - 3) // 2
    return name if len(name) <= NAME_CHARS else f"{name[:half]}...{name[-half:]}"
