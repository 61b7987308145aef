"""The plots of a run, each built by a function that returns the figure unsaved."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from ray_probe.report.change_plots import change_plots
from ray_probe.report.number_format import number, with_error
from ray_probe.report.plot_style import (
    BLUE,
    CHECKPOINT_CHARS,
    INK,
    MODE_COLOR,
    MODE_MARKER,
    PURPLE,
    SMALL,
    VERMILION,
    canvas,
    caption,
    closed,
    dress,
    end_of,
    floats,
    in_background,
    log_if_wide,
    marker_size,
    nothing,
    room_above,
    short,
    symlog,
    whole_rounds,
)
from ray_probe.run.result import Estimate, Result
from ray_probe.run.rounds_file import Advantage, FinishedRound

Rounds = Sequence[FinishedRound]

DPI = 150
SYMLOG_RANGE = 100.0
SMALLEST_SHOWN = 1e-8  # of the largest: a wider axis would take room from the other bars
BARS_LOG_RANGE = 60.0
LINES_LOG_RANGE = 8.0


def write_plots(result: Result, rounds: Rounds, directory: Path) -> list[Path]:
    """Write every plot as a PNG; returns the paths.

    Args:
        result: of the run.
        rounds: its finished rounds, in order.
        directory: for the files; created if missing.
    """
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, figure in figures(result, rounds).items():
        paths.append(directory / f"{name}.png")
        part = directory / f"{name}.part"  # the process may be killed while it writes
        figure.savefig(part, dpi=DPI, format="png")
        part.replace(paths[-1])
    return paths


def figures(result: Result, rounds: Rounds) -> dict[str, Figure]:
    """Return all figures by file name without suffix."""
    drawn = {
        "advantage_by_mode": advantage_by_mode(result),
        "beta_by_feature": beta_by_feature(result),
        "residual_by_position": residual_by_position(result),
        "entropy_by_round": entropy_by_round(result, rounds),
        "advantage_by_round": advantage_by_round(result, rounds),
        **({} if result.change is None else change_plots(result.change)),
    }
    for figure in drawn.values():
        caption(figure.axes[0], caption_of(result))
    return drawn


def caption_of(result: Result) -> str:
    """Return one line with checkpoint, sampling policy and number of responses."""
    settings = result.settings
    names = ["/".join(Path(path).parts[-2:]) for path in (settings.path, settings.adapter) if path]
    known = {"temperature": settings.temperature, "top_p": settings.top_p, "cap": settings.max_new_tokens}
    policy = [f"{name} {value:g}" for name, value in known.items() if value is not None]
    responses = number(result.counts.sequences)
    checkpoint = " + ".join(end_of(name, CHECKPOINT_CHARS // len(names)) for name in names)
    if settings.against is not None:
        before = end_of("/".join(Path(settings.against).parts[-2:]), CHECKPOINT_CHARS)
        checkpoint = f"from {before} to {checkpoint}"
    return ", ".join([checkpoint, *policy, f"{responses} responses"])


def round_numbers(rounds: Rounds) -> list[int]:
    """Return the numbers of the rounds as people count: from 1."""
    return [entry.round + 1 for entry in rounds]


def advantage_by_mode(result: Result) -> Figure:
    """Draw bars of the mean squared advantage by baseline, with errors and ratios."""
    figure, axes = canvas("Noise of the score term, by baseline", "", "mean square of A, nats² per token")
    squares, errors = result.advantage_mean_square, result.advantage_mean_square_se
    modes = [mode for mode in MODE_COLOR if mode in squares]
    heights, error_bars = floats(squares[mode] for mode in modes), floats(errors.get(mode) for mode in modes)
    bars = axes.bar(range(len(modes)), heights, width=0.68, color=[MODE_COLOR[mode] for mode in modes])
    axes.errorbar(range(len(modes)), heights, error_bars, fmt="none", ecolor=INK, elinewidth=1.4, capsize=4)
    room_above(axes, heights + np.nan_to_num(error_bars), log_if_wide(axes, heights, BARS_LOG_RANGE))
    for mode, bar, height, error in zip(modes, bars, heights, error_bars, strict=True):
        ratio = result.advantage_mean_square_ratio.get(mode) or Estimate()
        times = "" if mode == "none" else f"\nratio to none\n{with_error(ratio.value, ratio.se)}"
        top = np.nansum([height, error])
        axes.annotate(
            with_error(float(height), float(error)) + times, (bar.get_x() + bar.get_width() / 2, top), (0, 4),
            textcoords="offset points", ha="center", va="bottom", fontsize=SMALL, color=INK,
        )  # fmt: skip
    used = result.settings.mode
    axes.set_xticks(range(len(modes)), [f"{mode}\n(in use)" if mode == used else mode for mode in modes])
    axes.grid(axis="x", visible=False)
    return figure


def beta_by_feature(result: Result) -> Figure:
    """Draw horizontal bars of beta; the axis is symlog when the values range widely."""
    beta, names = result.beta, result.beta.features
    title = f"Fitted baseline, version {number(beta.version)}" + ("" if beta.r2 is None else f", R² = {beta.r2:.3f}")
    title += "" if result.settings.mode == "regression" else " (not in use)"
    x_label = "beta, nats per unit of the feature\n(units differ: bar lengths do not rank features)"
    figure, axes = canvas(title, x_label, "")
    figure.set_size_inches(7.2, 1.6 + 0.42 * max(3, len(names)))
    if not beta.values:
        axes.set_xlabel("")
        return nothing(figure, axes, f"beta could not be fitted\nfallback: {beta.fallback or 'none'}")
    values = floats(beta.values)
    sizes = np.abs(values[np.isfinite(values) & (values != 0)])
    if sizes.size and sizes.max() > SYMLOG_RANGE * sizes.min():
        symlog(axes, max(float(sizes.min()), SMALLEST_SHOWN * float(sizes.max())), float(sizes.max()))
    colors = [VERMILION if value < 0 else BLUE for value in values]
    axes.barh(range(len(names)), values, height=0.66, color=colors)
    for index, value in enumerate(values):
        axes.annotate(
            number(float(value), 3), (value if np.isfinite(value) else 0.0, index), (-5 if value < 0 else 5, 0),
            textcoords="offset points", va="center", ha="right" if value < 0 else "left", fontsize=SMALL, color=INK,
        )  # fmt: skip
    axes.axvline(0.0, color=INK, linewidth=0.9)
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    room = 0.5 if len(names) > 2 else 1.0
    axes.set_ylim(len(names) - 1 + room, -room)
    axes.margins(x=0.18)
    axes.grid(axis="y", visible=False)
    return figure


def residual_by_position(result: Result) -> Figure:
    """Draw the mean target and `mu_hat` by position, their difference shaded."""
    figure, axes = canvas("What the baseline explains, by position", "token position j", "mean by position, nats")
    positions, mode = result.positions, str(result.settings.mode)
    tokens = floats(positions.tokens)
    if not tokens.sum():
        return nothing(figure, axes, "no tokens")
    edges, means = floats(positions.edges), (positions.target_mean, positions.mu_hat_mean)
    target, mu_hat = (np.where(tokens > 0, floats(mean), np.nan) for mean in means)
    in_background(axes, tokens, edges, "tokens in the bin")
    naive = result.settings.x_estimator_mode == "naive"
    followed = f"target r: {'surprisal' if naive else 'entropy'} of the tokens after j"
    axes.stairs(target, edges, baseline=None, color=INK, linewidth=2.0, label=followed)
    fitted = f"explained by the baseline ({mode})"
    color = next((color for name, color in MODE_COLOR.items() if name == mode), BLUE)
    axes.stairs(mu_hat, edges, baseline=None, color=color, linewidth=2.0, label=fitted)
    axes.fill_between(
        edges, closed(target), closed(mu_hat), step="post", color=VERMILION, alpha=0.35, linewidth=0,
        zorder=0.9, label="unexplained: mean of A",
    )  # fmt: skip
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(bottom=min(0.0, float(np.nanmin([target, mu_hat]))))
    axes.legend(frameon=False, fontsize=SMALL)
    return figure


def entropy_by_round(result: Result, rounds: Rounds) -> Figure:
    """Draw the entropy of each round, and of all rounds as a band."""
    figure = Figure(figsize=(7.2, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    dress(upper, "Entropy of responses, by round", "", "nats per sequence")
    dress(lower, "", "round", "nats per token")
    at = round_numbers(rounds)
    for axes, key in ((upper, "per_sequence"), (lower, "per_token")):
        value, error = floats(getattr(result.entropy, name) for name in (key, f"{key}_se"))
        if np.isfinite(value):
            half = float(np.nan_to_num(error))
            axes.axhspan(value - half, value + half, color=PURPLE, alpha=0.18, linewidth=0)
            label = f"all rounds: {with_error(float(value), float(error))}"
            axes.axhline(value, color=PURPLE, linewidth=1.2, linestyle="--", label=label)
        means, errors = (floats(getattr(entry.entropy, name) for entry in rounds) for name in (key, f"{key}_se"))
        size = marker_size(at)
        axes.errorbar(
            at, means, errors, fmt="o", color=PURPLE, markersize=size, capsize=0.6 * size, elinewidth=0.2 * size,
            label="one round ± 1 se",
        )  # fmt: skip
        axes.legend(frameon=False, fontsize=SMALL, ncols=2)
        axes.margins(y=0.3)
    whole_rounds(lower, at)
    figure.align_ylabels()
    return figure


def advantage_by_round(result: Result, rounds: Rounds) -> Figure:
    """Draw the mean squared advantage of each round by baseline."""
    figure, axes = canvas("Noise of the score term, by round", "round", "mean square of A, nats² per token")
    at, used, drawn = round_numbers(rounds), result.settings.mode, []
    for mode, color in MODE_COLOR.items():
        heights = floats(entry.advantage.get(mode, Advantage()).mean_square for entry in rounds)
        if np.isfinite(heights).any():
            label = f"{mode} (in use)" if mode == used else mode
            width = 2.6 if mode == used else 1.5
            axes.plot(
                at, heights, color=color, marker=MODE_MARKER[mode], markersize=marker_size(at), linewidth=width,
                label=label,
            )  # fmt: skip
            drawn.append(heights)
    log_if_wide(axes, np.concatenate(drawn) if drawn else np.empty(0), LINES_LOG_RANGE)
    whole_rounds(axes, at)
    if drawn:
        figure.legend(loc="outside lower center", ncols=4, frameon=False, fontsize=SMALL)
    return figure
