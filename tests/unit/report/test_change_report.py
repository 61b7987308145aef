"""What a comparison says in words, in its table, its exports and its plots."""

import io
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.results import some_rounds, typed

from ray_probe.report.caveats import caveats
from ray_probe.report.change_plots import change_plots, holm
from ray_probe.report.export import figures_of, result_csv, result_markdown
from ray_probe.report.number_format import signed, with_error
from ray_probe.report.plots import caption_of, write_plots
from ray_probe.report.result_table import result_table
from ray_probe.report.verdict import verdict
from ray_probe.run.comparison.change import (
    AtBoth,
    Change,
    ChangeFigure,
    ChangePart,
    Divergence,
    Figure,
    OutsideShares,
    PartChange,
    PromptChange,
    Shares,
)
from ray_probe.run.result import Gradient, Result

TOTAL = ChangeFigure(-0.4631, 0.0312, None, (-0.524, -0.402))


def a_change(**changes: Any) -> Change:
    found = Change(
        total=TOTAL,
        pathwise=ChangeFigure(-0.3294, 0.0211, 0.0123, (-0.371, -0.288)),
        visitation=ChangeFigure(-0.1337, 0.0241, None, (-0.181, -0.086)),
        entropy_a=Figure(9.272, 0.412),
        entropy_b=Figure(8.809, 0.401),
        per_token=AtBoth(Figure(0.3361, 0.0091), Figure(0.3127, 0.0089), Figure(-0.0234, 0.0014)),
        length=AtBoth(Figure(27.61, 1.1), Figure(28.19, 1.2), Figure(0.583, 0.104)),
        truncated=Shares(0.011, 0.013),
        js=0.0412,
        kl=Divergence(0.203, None),
        effective_sample_share=0.69,
        outside=OutsideShares(0.0021, 0.0008),
        moved_share=0.998,
        clusters=512,
        positions=(ChangePart(0, 4, 2048, -0.119, 0.011), ChangePart(4, 8, 1930, -0.3441, 0.03)),
        token_entropy=(ChangePart(0, 0, 9000, 0.0, 0.0), ChangePart(0.0, 0.48, 1200, -0.4631, 0.0312)),
        prompts=(PromptChange(7, 4, -0.02), PromptChange(None, 508, -0.4431)),
    )
    return replace(found, **changes)


def a_result(**changes: Any) -> Result:
    compare = {"against": "configs/models/earlier", "adapter": None}
    config = {"config__compare": compare, "config__batch__responses_per_prompt": 4}
    return replace(typed(**config), change=a_change(**changes), gradient=Gradient(why_null="is not measured"))


def shown(result: Result, width: int = 100, verbose: bool = False) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, _environ={}).print(result_table(result, verbose))
    return stream.getvalue()


def test_the_verdict_is_the_sentence_that_a_team_asks_for() -> None:
    judged = verdict(a_result())
    assert judged.text == (
        "entropy changed by -0.463 ± 0.031 nats a response, -0.0234 ± 0.0014 a token: -0.329 ± 0.021 at the states "
        "visited, -0.134 ± 0.024 through which states are visited; responses are 0.58 ± 0.10 tokens longer"
    )
    assert judged.advice is None
    shorter = a_change().length
    shorter = replace(shorter, change=Figure(-0.583, 0.104))
    assert verdict(a_result(length=shorter)).text.endswith("responses are 0.58 ± 0.10 tokens shorter")


def test_no_change_is_a_verdict_with_its_interval_and_a_number_of_responses() -> None:
    judged = verdict(a_result(total=ChangeFigure(0.021, 0.027, None, (-0.032, 0.074))))
    assert judged.text == "no change seen; 95 % interval -0.032 to 0.074 nats a response"
    assert judged.advice == "about 8,200 responses for ± 0.013 nats: add rounds or prompts"


def test_equal_checkpoints_one_prompt_and_a_partial_result_are_said() -> None:
    assert verdict(a_result(total=ChangeFigure(0.0, 0.0, None, (0.0, 0.0)))).text.startswith("no change: both")
    alone = verdict(a_result(total=ChangeFigure(0.3, None, None, None)))
    assert "+0.3000 nats a response, without an error: that takes two prompts" in alone.text
    assert verdict(replace(a_result(), partial=("0/1",))).text.startswith("PARTIAL, so perhaps biased: entropy changed")
    assert verdict(a_result(total=ChangeFigure())).text == "the change of entropy is not known"


def test_the_table_begins_with_the_change_and_shows_no_gradient() -> None:
    text = shown(a_result())
    for expected in (
        "Change of the entropy of responses: from A = configs/models/earlier to B = configs/models/[tiny]",
        "adapter of A none, of B none", "-0.463 ± 0.031 nats", "-0.329 ± 0.021 nats", "-0.134 ± 0.024 nats",
        "-0.0234 ± 0.0014 nats", "+0.58 ± 0.10 tokens", "9.27 ± 0.41 nats", "8.81 ± 0.40 nats",
    ):  # fmt: skip
        assert expected in text, expected
    assert "snr" not in text and "norm" not in text


def test_the_long_table_shows_where_the_change_is_made() -> None:
    text = shown(a_result(), verbose=True)
    for expected in (
        "-0.524 to -0.402", "0.0412 nats", "0.203 nats", "infinite", "0.69", "0.21 %", "0.08 %", "1.1 %, 1.3 %",
        "0 to 3", "-0.119 ± 0.011", "4 to 7", "no choice", "0 to 0.48", "-0.329 ± 0.012 nats",
        "0.3361 ± 0.0091 nats a token", "27.6 ± 1.1 tokens", "regression - constant",
    ):  # fmt: skip
        assert expected in text, expected


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_number_is_cut_at_any_width(width: int, verbose: bool) -> None:
    text = " ".join(shown(a_result(), width, verbose).split())
    plain = re.sub(r"[│┃─━]", " ", text)
    expected = ["-0.463 ± 0.031", "-0.329 ± 0.021", "-0.134 ± 0.024", "-0.0234 ± 0.0014", "9.27 ± 0.41"]
    expected += ["-0.119 ± 0.011", "-0.344 ± 0.030"] if verbose else []
    for number in expected:
        assert number in plain, number
    assert max(map(len, shown(a_result(), width, verbose).splitlines())) <= width


def test_far_checkpoints_and_hidden_steps_are_warned_of() -> None:
    assert not [line for line in caveats(a_result()) if line.startswith(("FAR", "FEW PARAMETERS"))]
    assert any(line.startswith("FAR APART: ") for line in caveats(a_result(effective_sample_share=0.04)))
    few = [line for line in caveats(a_result(moved_share=0.03)) if line.startswith("FEW PARAMETERS MOVED: 3.0 %")]
    assert few
    assert not [line for line in caveats(a_result(moved_share=0.0)) if line.startswith("FEW")], "equal checkpoints"


def test_exports_name_every_figure() -> None:
    result = a_result()
    named = {figure.name: figure for figure in figures_of(result)}
    assert (named["change.total"].value, named["change.total"].error) == (-0.4631, 0.0312)
    assert named["change.per_token.change"].error == 0.0014 and named["change.length.b"].value == 28.19
    assert named["change.positions.4-8"].value == -0.3441
    assert "change.total,-0.4631,0.0312,nats" in result_csv(result)
    assert "-0.463 ± 0.031" in result_markdown(result)
    assert not [name for name in {figure.name for figure in figures_of(typed())} if name.startswith("change")]


def test_plots_of_a_comparison_are_written_beside_the_others(tmp_path: Path) -> None:
    names = {path.name for path in write_plots(a_result(), some_rounds(), tmp_path)}
    assert {"change.png", "change_by_position.png", "change_by_entropy.png", "entropy_by_round.png"} <= names
    assert caption_of(a_result()).startswith("from models/earlier to models/[tiny], temperature 0.8")
    bars = change_plots(a_change())["change"].axes[0].patches
    assert [bar.get_height() for bar in bars] == [-0.4631, -0.3294, -0.1337]


def with_parts() -> Change:
    parts = [PartChange(f"layer {n} {kind}", -0.01 * n, 0.002) for n in range(1, 3) for kind in ("q", "mlp")]
    return a_change(parts=(PartChange("embedding", 0.003, 0.004), *parts), remainder=Figure(-0.4031, 0.044))


def test_the_parts_of_the_update_are_shown_with_their_errors_and_what_they_leave_out() -> None:
    result = replace(a_result(), change=with_parts())
    text = shown(result, verbose=True)
    for expected in ("layer 2 mlp", "-0.0200 ± 0.0020", "+0.0030 ± 0.0040", "remainder", "-0.403 ± 0.044"):
        assert expected in text, expected
    assert "remainder" not in shown(a_result(), verbose=True)
    named = {figure.name: figure.value for figure in figures_of(result)}
    assert (named["change.parts.layer 1 q"], named["change.remainder"]) == (-0.01, -0.4031)
    figure = change_plots(with_parts())["change_by_part"]
    left, right = figure.axes[:2]
    assert [label.get_text() for label in left.get_xticklabels()] == ["q", "mlp"]
    assert left.get_images()[0].get_array().tolist() == [[-0.01, -0.01], [-0.02, -0.02]]
    assert [text.get_text() for text in left.texts] == ["*"] * 4
    assert [label.get_text() for label in right.get_yticklabels()] == ["embedding", "remainder"]
    assert "change_by_part" not in change_plots(a_change())


def test_holm_marks_what_differs_from_0_over_all_bars() -> None:
    assert holm([(3.0, 1.0), (0.1, 1.0), (-2.4, 1.0)]) == [True, False, True]
    assert holm([(2.1, 1.0)]) == [True] and holm([(2.1, 1.0)] * 1 + [(0.0, 1.0)] * 3) == [False] * 4
    assert holm([(1.0, 0.0), (1.0, float("nan"))]) == [False, False]


def test_a_sign_is_written_where_it_is_asked_for() -> None:
    assert (signed(0.5), signed(-0.5), signed(None)) == ("+0.5000", "-0.5000", "n/a")
    assert (with_error(0.5, 0.1, plus=True), with_error(-0.5, 0.1, plus=True)) == ("+0.50 ± 0.10", "-0.50 ± 0.10")
    assert with_error(0.0, 0.1, plus=True) == "0.00 ± 0.10"
