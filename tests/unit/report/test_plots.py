import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from support.results import MODES, SQUARES, a_result, set_in, some_rounds, typed

from ray_probe.report.plots import caption_of, figures, write_plots
from ray_probe.run.result import Result

NAMES = ["advantage_by_mode", "beta_by_feature", "residual_by_position", "entropy_by_round", "advantage_by_round"]


def labels_of(figure: Figure) -> str:
    return " ".join(f"{axes.get_xlabel()} {axes.get_ylabel()}" for axes in figure.axes)


def texts_of(figure: Figure) -> str:
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def error_bars(axes: Any) -> list[Any]:
    return [segment for bars in axes.containers if hasattr(bars, "has_yerr") for segment in bars[2][0].get_segments()]


def test_every_plot_is_written_as_a_png(tmp_path: Path) -> None:
    paths = write_plots(typed(), some_rounds(), tmp_path / "plots")
    assert [path.name for path in paths] == [f"{name}.png" for name in NAMES]
    for path in paths:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
        assert path.stat().st_size > 5000


def test_axes_carry_units() -> None:
    drawn = figures(typed(), some_rounds())
    for name, units in zip(NAMES, ("nats²", "nats per unit", "token position nats tokens", "round nats", "round nats²"),
                           strict=True):  # fmt: skip
        assert all(unit in labels_of(drawn[name]) for unit in units.split()), name


def test_bars_of_the_modes_are_the_results_figures() -> None:
    figure = figures(typed(), some_rounds())["advantage_by_mode"]
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == list(SQUARES.values())
    spans = [float(np.ptp(segment[:, 1])) for segment in error_bars(axes)]
    assert spans == pytest.approx([2 * 0.021 * square for square in SQUARES.values()])
    assert "0.0434 ± 0.0010" in texts_of(figure) and "17.91 ± 0.38" in texts_of(figure), "no number without its error"
    assert [label.get_text() for label in axes.get_xticklabels()][-1] == "regression\n(in use)"
    assert axes.get_yscale() == "linear"
    assert axes.get_ylim()[0] == 0


def test_modes_that_range_widely_get_a_logarithmic_axis() -> None:
    result = a_result()
    set_in(result, "advantage_mean_square.regression", 0.41)
    axes = figures(Result.from_json(result), some_rounds())["advantage_by_mode"].axes[0]
    assert axes.get_yscale() == "log"
    assert 0 < axes.get_ylim()[0] < 0.41


def test_bars_of_beta_are_the_fitted_values_from_top_to_bottom() -> None:
    figure = figures(typed(), some_rounds())["beta_by_feature"]
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.8123, -4.31, -39.02]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["H", "top1", "pos_frac"]
    assert axes.yaxis_inverted()
    assert axes.get_xscale() == "linear"
    assert "-39.0" in texts_of(figure)
    wide = a_result()
    set_in(wide, "beta.values", [0.0, 0.001, -39.02])
    assert figures(Result.from_json(wide), some_rounds())["beta_by_feature"].axes[0].get_xscale() == "symlog"


def test_the_explained_part_is_drawn_by_position_with_the_token_counts() -> None:
    figure = figures(typed(), some_rounds())["residual_by_position"]
    front, behind = figure.axes
    target, mu_hat = (step.get_data().values for step in front.patches)
    np.testing.assert_array_equal(target, [30.0, 20.0, np.nan, 1.0])
    np.testing.assert_array_equal(mu_hat, [28.0, 21.0, np.nan, 2.5])
    np.testing.assert_array_equal(behind.patches[0].get_data().values, [900, 500, 0, 20])
    assert len(front.collections) == 1  # the shaded difference
    assert front.get_zorder() > behind.get_zorder()


def test_rounds_are_drawn_with_errors_and_the_pooled_value() -> None:
    figure = figures(typed(), some_rounds(4))["entropy_by_round"]
    for axes, mean, pooled in zip(figure.axes, (28.0, 0.92), (28.412, 0.9213), strict=True):
        lines = [line.get_ydata() for line in axes.get_lines()]
        assert any(len(line) == 4 and set(line) == {mean} for line in lines)
        assert any(set(line) == {pooled} for line in lines)
        assert len(error_bars(axes)) == 4
        assert axes.patches  # the band


def test_modes_keep_their_colour_from_plot_to_plot() -> None:
    drawn = figures(typed(), some_rounds())
    lines = drawn["advantage_by_round"].axes[0].get_lines()
    assert [list(line.get_ydata()) for line in lines] == [[square] * 3 for square in SQUARES.values()]
    bars = drawn["advantage_by_mode"].axes[0].patches
    assert [bar.get_facecolor()[:3] for bar in bars] == [pytest.approx(rgb(line.get_color())) for line in lines]


def rgb(color: str) -> tuple[float, ...]:
    return tuple(int(color[start : start + 2], 16) / 255 for start in (1, 3, 5))


def test_rounds_are_counted_from_1() -> None:
    drawn = figures(typed(), some_rounds(3))
    for name in ("entropy_by_round", "advantage_by_round"):
        places = [line.get_xdata() for line in drawn[name].axes[0].get_lines()]
        assert any(list(place) == [1, 2, 3] for place in places), name


def test_every_plot_says_what_it_is_of() -> None:
    result = a_result()
    set_in(result, "config.model", {"path": "/runs/a/step-400", "adapter": "/adapters/lora"})
    for figure in figures(Result.from_json(result), some_rounds()).values():
        said = "a/step-400 + adapters/lora, temperature 0.8, top_p 0.95, cap 64, 2,048 responses"
        assert said in texts_of(figure)


def test_a_long_path_is_shown_by_its_end() -> None:
    result = a_result()
    set_in(result, "config.model.path", "/runs/a-run-of-training-with-a-long-name/step-400")
    checkpoint, *_ = caption_of(Result.from_json(result)).split(", ")
    assert checkpoint.startswith("...") and checkpoint.endswith("-a-long-name/step-400") and len(checkpoint) == 30


def test_a_fit_that_is_not_in_use_is_called_so() -> None:
    result = a_result()
    assert "not in use" not in titles_of(figures(Result.from_json(result), some_rounds())["beta_by_feature"])
    set_in(result, "config.estimator.baseline.mode", "residual_mu")
    assert "not in use" in titles_of(figures(Result.from_json(result), some_rounds())["beta_by_feature"])


def titles_of(figure: Figure) -> str:
    return " ".join(axes.get_title(loc="left") for axes in figure.axes)


ODD = {
    "no config": ({"config": {}}, ("advantage_by_mode", "beta_by_feature", "entropy_by_round")),
    "nothing measured": (
        {"entropy": {}, "positions": {}, "advantage_mean_square": {}, "beta": {}},
        ("advantage_by_mode", "residual_by_position", "entropy_by_round", "beta_by_feature"),
    ),
    "null sections": (
        {"advantage_mean_square_se": None, "advantage_mean_square_ratio": None, "positions": None},
        ("advantage_by_mode", "residual_by_position"),
    ),
    "null errors": (
        {
            "entropy.per_sequence_se": None, "entropy.per_token_se": math.nan, "advantage_mean_square_se.none": None,
            "advantage_mean_square_ratio.constant": None, "advantage_mean_square.residual_mu": None,
        },
        ("advantage_by_mode", "entropy_by_round"),
    ),
    "all zero": (
        {"advantage_mean_square": dict.fromkeys(MODES, 0.0), "beta.values": [0.0, 0.0, 0.0]},
        ("advantage_by_mode", "beta_by_feature"),
    ),
    "fallback": ({"beta.values": None, "beta.r2": None, "beta.fallback": "residual_mu"}, ("beta_by_feature",)),
    "long name": ({"beta.features": ["a_long_name_" * 20], "beta.values": [3.0]}, ("beta_by_feature",)),
    "extreme beta": ({"beta.values": [1e-300, -1e9, 1e30]}, ("beta_by_feature",)),
    "no tokens": ({"positions.tokens": [0, 0, 0, 0]}, ("residual_by_position",)),
    "one bin": (
        {"positions": {"edges": [0, 1], "tokens": [5.0], "target_mean": [0.0], "mu_hat_mean": [0.0]}},
        ("residual_by_position",),
    ),
    "extreme advantage": (
        {"advantage_mean_square.none": 1e12, "advantage_mean_square.regression": 1e-12}, ("advantage_by_mode",),
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", ODD)
def test_odd_results_are_drawn_all_the_same(case: str) -> None:
    changes, names = ODD[case]
    result, rounds = a_result(), some_rounds(1)
    for dotted, value in changes.items():
        set_in(result, dotted, value)
    rounds = [replace(rounds[0], entropy=replace(rounds[0].entropy, per_sequence_se=None, per_token=None))]
    drawn = figures(Result.from_json(result), rounds)
    for name in names:
        drawn[name].draw_without_rendering()


@pytest.mark.filterwarnings("error")
def test_no_finished_round_is_drawn_as_empty_plots() -> None:
    drawn = figures(typed(), [])
    for name in ("entropy_by_round", "advantage_by_round"):
        drawn[name].draw_without_rendering()
