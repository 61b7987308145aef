"""The plots of a comparison: its parts, and where the change is made."""

import re
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from matplotlib.figure import Figure

from ray_probe.report.number_format import number, with_error
from ray_probe.report.plot_style import BLUE, INK, PURPLE, SMALL, VERMILION, canvas, dress, floats, nothing
from ray_probe.run.comparison.chain import Chain, names_of
from ray_probe.run.comparison.change import Change, ChangePart, PartChange
from ray_probe.run.comparison.change import Figure as Figures

_LAYER = re.compile(r"layer (\d+) (.+)")
LEVEL = 0.05
"""Of a figure as a whole: the bars that Holm's method marks differ from 0."""
UNIT = "change of entropy, nats a response"


def change_plots(change: Change) -> dict[str, Figure]:
    """Return the figures of a comparison by file name without suffix."""
    positions = [(f"{part.first:g}-{part.last - 1:g}", part) for part in change.positions]
    levels = [
        ("no\nchoice" if part.first == part.last else f"{number(part.first, 2)}-\n{number(part.last, 2)}", part)
        for part in change.token_entropy
    ]
    update = {"change_by_part": update_figure(change)} if change.parts else {}
    return update | {
        "change": change_bars(change),
        "change_by_position": parts_figure("Where the change is made, by position", "position of the token", positions),
        "change_by_entropy": parts_figure(
            "Where the change is made, by the token's entropy", "mean entropy of both checkpoints, nats", levels
        ),
    }


def change_bars(change: Change) -> Figure:
    """Draw the total change and its two parts with their errors."""
    figure, axes = canvas("Change of the entropy of responses, B less A", "", UNIT)
    parts = (("total", change.total, PURPLE), ("pathwise", change.pathwise, BLUE),
             ("visitation", change.visitation, VERMILION))  # fmt: skip
    values, errors = floats(part.value for _, part, _ in parts), floats(part.se for _, part, _ in parts)
    axes.bar(range(len(parts)), values, width=0.6, color=[color for *_, color in parts])
    axes.errorbar(range(len(parts)), values, errors, fmt="none", ecolor=INK, elinewidth=1.4, capsize=4)
    for place, (value, error) in enumerate(zip(values, errors, strict=True)):
        below = value < 0
        edge = value - np.nan_to_num(error) if below else value + np.nan_to_num(error)
        axes.annotate(
            with_error(float(value), float(error), plus=True), (place, edge), (0, -5 if below else 5),
            textcoords="offset points", ha="center", va="top" if below else "bottom", fontsize=SMALL, color=INK,
        )  # fmt: skip
    names = ("total", "pathwise\nat the states visited", "visitation\nwhich states are visited")
    axes.set_xticks(range(len(parts)), names)
    axes.axhline(0.0, color=INK, linewidth=0.9)
    axes.margins(y=0.2)
    axes.grid(axis="x", visible=False)
    return figure


def parts_figure(title: str, x_label: str, parts: Sequence[tuple[str, ChangePart]]) -> Figure:
    """Draw parts that add up to the total; a star marks those that differ from 0."""
    figure, axes = canvas(title, x_label, UNIT)
    if not parts:
        return nothing(figure, axes, "no response")
    values, errors = floats(part.value for _, part in parts), floats(part.se for _, part in parts)
    marked = holm([(float(value), float(error)) for value, error in zip(values, errors, strict=True)])
    colors = [VERMILION if value < 0 else BLUE for value in values]
    axes.bar(range(len(parts)), values, width=0.68, color=colors)
    axes.errorbar(range(len(parts)), values, errors, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    for place, star in enumerate(marked):
        below = values[place] < 0
        edge = values[place] + np.nan_to_num(errors[place]) * (-1 if below else 1)
        axes.annotate(
            "*" if star else "", (place, edge), (0, -4 if below else 2), textcoords="offset points", ha="center",
            va="top" if below else "bottom", color=INK,
        )  # fmt: skip
    axes.set_xticks(range(len(parts)), [name for name, _ in parts])
    axes.axhline(0.0, color=INK, linewidth=0.9)
    axes.set_xlabel(f"{x_label}\n* differs from 0: Holm's method, {LEVEL:.0%} over all bars", fontsize=SMALL)
    axes.margins(y=0.2)
    axes.grid(axis="x", visible=False)
    return figure


def update_figure(change: Change) -> Figure:
    """Draw the parts of the update: a map of layers and kinds, bars for the rest."""
    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    dress(left, "Change by part of the update, to first order", "", "layer")
    cells = {match.group(1, 2): part for part in change.parts if (match := _LAYER.fullmatch(part.group))}
    layers, kinds = sorted({int(layer) for layer, _ in cells}), list(dict.fromkeys(kind for _, kind in cells))
    if cells:
        found = [[cells.get((str(layer), kind)) for kind in kinds] for layer in layers]
        values = np.array([[np.nan if part is None else float(part.value or 0.0) for part in row] for row in found])
        most = float(np.nanmax(np.abs(values))) or 1.0
        image = left.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
        figure.colorbar(image, ax=left, label="nats a response")
        tested = [(float(part.value or 0.0), float(part.se or 0.0)) for part in cells.values()]
        stars = dict(zip(cells, holm(tested), strict=True))
        for (layer, kind), star in stars.items():
            place = kinds.index(kind), layers.index(int(layer))
            dark = abs(values[place[1], place[0]]) > most / 2.0
            left.text(*place, "*" if star else "", ha="center", va="center", color="white" if dark else INK)
    left.set_xticks(range(len(kinds)), kinds)
    left.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    left.grid(visible=False)
    rest = [(part.group, part) for part in change.parts if not _LAYER.fullmatch(part.group)]
    others: list[tuple[str, PartChange | Figures]] = [*rest, ("remainder", change.remainder)]
    dress(right, "", "nats a response", "")
    values_N, errors_N = floats(part.value for _, part in others), floats(part.se for _, part in others)
    right.barh(range(len(others)), values_N, color=[VERMILION if value < 0 else BLUE for value in values_N])
    right.errorbar(values_N, range(len(others)), xerr=errors_N, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    right.set_yticks(range(len(others)), [name for name, _ in others])
    right.invert_yaxis()
    right.axvline(0.0, color=INK, linewidth=0.9)
    return figure


def chain_figure(chain: Chain) -> Figure:
    """Draw the entropy along a chain as a band, and the parts of each step as bars."""
    figure = Figure(figsize=(7.2, 6.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    dress(upper, "Entropy of responses along the chain", "", "nats a response")
    dress(lower, "", "", UNIT)
    names = names_of([chain.steps[0].a, *(step.b for step in chain.steps)])
    levels = [chain.entropy_first, *(step.entropy for step in chain.steps)]
    values, errors = floats(one.value for one in levels), np.nan_to_num(floats(one.se for one in levels))
    at = np.arange(len(names))
    upper.fill_between(at, values - errors, values + errors, color=PURPLE, alpha=0.18, linewidth=0, label="± 1 se")
    upper.plot(at, values, "o-", color=PURPLE, label="first, and the changes since")
    upper.legend(frameon=False, fontsize=SMALL)
    for shift, name, color in ((-0.17, "pathwise", BLUE), (0.17, "visitation", VERMILION)):
        parts = [getattr(step, name) for step in chain.steps]
        heights, bars = floats(part.value for part in parts), floats(part.se for part in parts)
        lower.bar(at[1:] - 0.5 + shift, heights, width=0.32, color=color, label=name)
        lower.errorbar(at[1:] - 0.5 + shift, heights, bars, fmt="none", ecolor=INK, elinewidth=1.2, capsize=3)
    lower.axhline(0.0, color=INK, linewidth=0.9)
    lower.legend(frameon=False, fontsize=SMALL)
    lower.set_xticks(at, names)
    figure.align_ylabels()
    return figure


def holm(parts: Sequence[tuple[float, float]], level: float = LEVEL) -> list[bool]:
    """Return which estimates differ from 0, by Holm's method.

    The chance of any false mark is at most `level`.

    Args:
        parts: value and standard error of each; an error of 0 or NaN marks nothing.
        level: of all tests together.
    """
    tails = [
        2.0 * (1.0 - NormalDist().cdf(abs(value) / error)) if error > 0 and np.isfinite(value) else 1.0
        for value, error in parts
    ]
    marked = [False] * len(parts)
    for rank, place in enumerate(sorted(range(len(parts)), key=tails.__getitem__)):
        if tails[place] > level / (len(parts) - rank):
            break
        marked[place] = True
    return marked
