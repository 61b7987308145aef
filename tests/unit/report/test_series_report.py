"""Series as tables, CSV, Markdown and a plot: no number is cut, or without its error."""

import csv
import io
import re
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console
from support.series import a_change, a_point, a_series

from ray_probe.report.number_format import with_error
from ray_probe.report.series.export import CHANGE_COLUMNS, POINT_COLUMNS, series_csv, series_markdown
from ray_probe.report.series.plot import ROWS, series_figure
from ray_probe.report.series.table import series_tables, step_names
from ray_probe.run.series import Series


def shown(*found: Series, width: int = 100) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, _environ={}).print(series_tables(found))
    return stream.getvalue()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_number_of_a_series_is_cut_or_without_its_error(width: int):
    text = shown(a_series(), width=width)
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.split())
    for point in a_series().points:
        for figure in (point.entropy, point.per_token, point.length):
            assert with_error(figure.value, figure.se) in words
    for change in a_series().changes:
        for figure in (change.total, change.since_first):
            assert with_error(figure.value, figure.se, plus=True) in words


def test_at_80_columns_parts_and_checks_are_there_too():
    text = shown(a_series(), width=80)
    for expected in ("-0.410 ± 0.064", "-0.102 ± 0.093", "3 %", "3.37", "0 to", "n/a", "± one standard error"):
        assert expected in text, expected
    assert "grpo: 3 checkpoints, 2 comparisons, 2 to be measured, 1 measurement failed or cancelled" in " ".join(
        text.split()
    )


def test_several_series_are_shown_one_below_the_other_and_none_says_how_to_begin():
    text = shown(a_series("one"), a_series("two", points=(), changes=(), open=1, failed=0))
    assert text.index("one: 3 checkpoints") < text.index("two: 0 checkpoints")
    assert "probe CHECKPOINT --series NAME" in " ".join(shown().split())


def test_a_checkpoint_without_a_step_goes_by_the_end_of_its_path():
    series = a_series(points=(a_point(None, checkpoint="/a/last"), a_point(None, checkpoint="/b/last"), a_point(7)))
    assert step_names(series) == ["a/last", "b/last", "7"]


def test_csv_has_every_digit_and_a_line_for_each_comparison():
    series = replace(a_series(), changes=(*a_series().changes, a_change(0, 100, -1.2)))
    lines = list(csv.DictReader(io.StringIO(series_csv([series]))))
    assert tuple(lines[0]) == (*POINT_COLUMNS, *CHANGE_COLUMNS)
    assert [(line["step"], line["change.first_step"]) for line in lines] == [
        ("0", ""), ("50", "0"), ("100", "50"), ("100", "0"),
    ]  # fmt: skip
    assert float(lines[1]["entropy"]) == 27.9 and float(lines[1]["entropy_se"]) == 0.618
    assert float(lines[1]["change.pathwise"]) == 0.8 * -0.512 and lines[2]["change.since_first"] == ""
    assert (lines[0]["tags"], lines[0]["measurements"], lines[2]["snr"]) == ("lr=1e-6", "m0;c0", "")


def test_markdown_has_two_tables_a_series():
    text = series_markdown([a_series("one"), a_series("two", changes=())])
    assert text.count("| step |") == 2 and text.count("| from | to |") == 1
    assert "| 50 | 100 | -0.70 ± 0.12 |" in text and "27.90 ± 0.62" in text


def heights(axes: object) -> list[float]:
    return [float(bar.get_height()) for bar in axes.patches]  # type: ignore[attr-defined]


def test_the_plot_shows_every_figure_over_the_trainers_steps_with_its_band():
    figure = series_figure([a_series()])
    assert len(figure.axes) == len(ROWS) + 1
    entropy, change = figure.axes[0], figure.axes[2]
    (line,) = entropy.lines
    assert line.get_xdata().tolist() == [0.0, 50.0, 100.0] and line.get_ydata().tolist() == [28.412, 27.9, 27.2]
    band = entropy.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (pytest.approx(27.2 - 0.618), pytest.approx(28.412 + 0.618))
    assert heights(change) == pytest.approx([0.8 * -0.512, 0.8 * -0.7, 0.2 * -0.512, 0.2 * -0.7])
    middles = [bar.get_x() + bar.get_width() / 2 for bar in change.patches]
    assert np.array(middles).reshape(2, 2).mean(axis=0).tolist() == pytest.approx([25.0, 75.0])
    assert figure.axes[-1].get_xlabel() == "step of the trainer"
    labels = " ".join(axes.get_ylabel() for axes in figure.axes)
    assert all(word in labels for word in ("response", "token", "noise", "cut", "parity", "change", "length"))


def test_series_are_drawn_side_by_side_and_unknown_figures_are_said_to_be_unknown(tmp_path):
    lone = a_series("two", points=(a_point(None, snr=None, checkpoint="/c/x"),), changes=())
    empty = a_series("three", points=(), changes=())
    figure = series_figure([a_series("one"), lone, empty])
    assert len(figure.axes) == 3 * (len(ROWS) + 1)
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "not measured" in texts and "no checkpoint is measured yet" in texts
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == ["one", "two", "three"]
    assert figure.axes[-2].get_xticklabels()[0].get_text() == "x"
    figure.savefig(tmp_path / "x.png")
    assert re.match(rb"\x89PNG", (tmp_path / "x.png").read_bytes())
