import io
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from support.replies import a_beta, a_progress, a_status, a_variance, an_info

from ray_probe.cli.tables.listing import listing_csv, listing_markdown
from ray_probe.cli.tables.service_tables import beta_table, results_table, status_table, variance_table
from ray_probe.controller.replies import MeasurementInfo, Status
from ray_probe.run.result import Estimate, Gradient

NOW = datetime(2026, 5, 1, 12, 13, 5, tzinfo=UTC)
NO_ESTIMATES: dict[str, Any] = dict.fromkeys(
    (
        "advantage_variance", "advantage_mean_square", "advantage_mean_square_ratio", "advantage_paired", "gradient",
        "beta_version", "mode",
    )
)  # fmt: skip
UNFITTED: dict[str, Any] = {"values": None, "r2": None, "condition_number": None, "fallback": "residual_mu"}


def shown(table: RenderableType, width: int = 100, colour: bool = False) -> str:
    stream = io.StringIO()
    system: Any = "standard" if colour else "auto"
    Console(file=stream, width=width, force_terminal=colour, color_system=system, _environ={}).print(table)
    return stream.getvalue()


def one_line(table: RenderableType) -> str:
    """The text without its layout: rules, frames and line breaks are gone."""
    return " ".join("".join(" " if char in "─━┃┏┓┗┛!" else char for char in shown(table)).split())


def row(table: RenderableType, name: str) -> str:
    """The first line that starts with that word, or has it after the name of its section."""
    return next(line for line in shown(table).splitlines() if name in line.split()[:2])


def of_status(**fields: Any) -> RenderableType:
    return status_table(replace(a_status(), **fields), NOW)


def test_status_tells_who_where_what_and_for_how_long() -> None:
    text = one_line(of_status())
    for expected in (
        "demo service measuring", "up 2 h 13 min, since 2026-05-01 10:00:00 UTC", "namespace ray_probe",
        "directory /runs/demo", "m0003 /checkpoints/run-7/step-[200]", "round 2 of 4", "records 3/8", "gradients 1/8",
        "speed 449 tokens/s", "12,345 tokens", "beta version 3", "variance ratio 0.0434", "shards retried 2",
        "whole rounds 1 so far", "responses 1,024", "28.41 ± 0.62 nats per response", "Queue waiting 2 m0004, m0005",
        "ended 2", "nodes 2", "CPU 12.5 of 16 free", "GPU 1 of 4 free", "slot 0 of 2 free",
    ):  # fmt: skip
        assert expected in text, expected
    assert "read this" not in text
    assert "DRAINING" not in text


def test_status_shows_each_actor_and_what_is_not_known_of_it_yet() -> None:
    text = one_line(of_status())
    assert "4 collect shard 3 of round 2 10.0.0.7 41234 81,234" in text, "rounds are counted from 1"
    assert "6 accumulate shard 0 of round 2, leaving 10.0.0.8 41235 1,234" in text
    assert "7 starting n/a n/a n/a" in text


@pytest.mark.parametrize(
    ("asked", "have", "note", "red"),
    [(3, 2, "1 missing", True), (3, 3, "", False), (1, 3, "2 too many", False), (2, 0, "2 missing", True)],
)
def test_asked_and_have_are_always_there_and_red_when_there_are_fewer(
    asked: int, have: int, note: str, red: bool
) -> None:
    for fields in ({}, {"state": "starting", "actors": (), "measurement": None, "progress": None}):
        table = of_status(actors_asked=asked, actors_alive=have, **fields)
        line = row(table, "asked")
        assert f"asked {asked}, have {have}" in line
        assert note in line
        assert (f"\x1b[1;31masked {asked}, have {have}" in shown(table, colour=True)) is red


@pytest.mark.parametrize(
    ("asked", "have", "starting", "leaving", "note", "red"),
    [
        (3, 0, 3, 0, "3 loading", False),
        (3, 1, 2, 0, "2 loading", False),
        (3, 1, 1, 0, "1 loading, 1 missing", True),
        (1, 1, 0, 2, "2 too many", False),
        (1, 0, 1, 2, "1 loading, 2 too many", False),
    ],
)
def test_actors_that_load_are_not_missing_and_those_that_leave_are_counted_though_they_load(
    asked: int, have: int, starting: int, leaving: int, note: str, red: bool
) -> None:
    staff = {"actors_asked": asked, "actors_alive": have, "actors_starting": starting, "actors_leaving": leaving}
    table = of_status(**staff)
    assert note in row(table, "asked") and (f"{note}, " in row(table, "asked")) is (leaving > 0)
    assert ("missing" in row(table, "asked")) is red
    assert (f"\x1b[1;31masked {asked}, have {have}" in shown(table, colour=True)) is red


@pytest.mark.parametrize("state", ["starting", "idle", "loading", "measuring", "closing", "failed"])
@pytest.mark.parametrize("kind", ["service", "run"])
def test_status_without_a_measurement_says_so_in_every_state(state: str, kind: str) -> None:
    text = one_line(of_status(state=state, kind=kind, measurement=None, progress=None, queued=()))
    assert f"demo {kind} {state}" in text
    assert "Work none" in text
    assert ("queue one: probe CHECKPOINT" in text) is (kind == "service")
    assert "waiting 0" in text


def test_status_before_the_first_shard_and_the_first_round_has_no_figures_of_them() -> None:
    info = replace(an_info(), rounds=0, sequences=0, entropy=None, gradient=None, beta_version=None)
    text = one_line(of_status(state="loading", measurement=info, progress=None))
    assert "round before its first shard" in text
    assert "whole rounds 0" in text and "responses 0" in text
    assert "per response" not in text
    at_start = replace(a_progress(), round=0, rounds=None, tokens=0, elapsed_s=0.0, version=0, variance_ratio=None)
    text = one_line(of_status(measurement=info, progress=at_start))
    for expected in ("round 1, until a budget ends it", "speed n/a tokens/s", "beta none yet", "variance ratio n/a"):
        assert expected in text, expected


def test_status_says_that_it_drains_and_asks_for_nothing_then() -> None:
    text = one_line(of_status(draining=True, measurement=None, progress=None, queued=()))
    assert "DRAINING: takes nothing new" in text
    assert "probe CHECKPOINT" not in text


def test_what_is_wrong_stands_at_the_end_worst_first() -> None:
    text = one_line(
        of_status(problem="no room", last_failure="actor 5: out of [memory]", warnings=("1 shard an actor",))
    )
    end = text[text.index("read this") :]
    places = [end.index(part) for part in ("PROBLEM: no room", "LAST FAILURE: actor 5: out of [memory]", "1 shard an")]
    assert places == sorted(places)
    assert "Cluster" not in end


def test_a_long_queue_is_cut_and_the_rest_counted() -> None:
    text = one_line(of_status(queued=tuple(f"m{number:04d}" for number in range(4, 34))))
    assert "waiting 30" in text
    assert "m0015 and 18 more" in text


@pytest.mark.parametrize(
    ("since", "expected"),
    [
        ("2026-05-01T12:13:01+00:00", "up 4 s"),
        ("2026-05-01T12:03:00+00:00", "up 10 min 5 s"),
        ("2026-04-28T10:00:00+00:00", "up 3 d 2 h"),
        ("2026-05-01T14:03:00+02:00", "up 10 min 5 s, since 2026-05-01 12:03:00 UTC"),
        ("2026-05-01T12:14:00+00:00", "up 0 s"),
    ],
)
def test_the_time_up_is_told_in_its_two_largest_units(since: str, expected: str) -> None:
    assert expected in one_line(of_status(since=since))


def test_paths_below_the_current_directory_are_shown_from_there() -> None:
    info = replace(an_info(), checkpoint=str(Path.cwd() / "runs/step-3"), adapter=str(Path.cwd() / "lora/7"))
    assert "m0003 runs/step-3 + lora/7" in one_line(of_status(measurement=info))


def test_variance_names_what_the_regression_reads() -> None:
    assert "regression reads H, sibling_mu" in one_line(variance_table(a_variance()))


def test_beta_says_what_each_column_reads() -> None:
    beta = replace(a_beta(), features=("H", "sibling_mu", "position_mean"), values=(1.0, 2.0, 3.0))
    text = one_line(beta_table(beta))
    for expected in ("H 1.000 prefix", "sibling_mu 2.000 siblings", "position_mean 3.000 prefix, records of the fit"):
        assert expected in text


def test_beta_names_every_coefficient_with_its_unit() -> None:
    text = one_line(beta_table(a_beta()))
    for expected in (
        "m0003: beta version 4, through round 4", "nats per unit Feature of the feature", "H 0.8123", "top1 -4.310",
        "pos_frac -39.02", "R² 0.834", "condition number 321,000",
        "81,234 tokens of 2,048 responses", "ridge_lambda 0.001", "policy 5f0c9a",
    ):  # fmt: skip
        assert expected in text, expected
    assert "read this" not in text


@pytest.mark.parametrize(("tokens", "why"), [(0, "there is no token to fit on"), (512, "the solve failed")])
def test_a_beta_that_could_not_be_fitted_says_what_stands_in_for_it(tokens: int, why: str) -> None:
    table = beta_table(replace(a_beta(), **UNFITTED, version=0, round=-1, tokens=tokens))
    text = one_line(table)
    assert "beta version 0, before any round" in text
    assert f"FALLBACK: beta could not be fitted, {why}; residual_mu replaces it." in text
    assert "R² n/a, condition number n/a" in text
    assert all("n/a" in row(table, name) for name in a_beta().features)


@pytest.mark.parametrize(("condition", "flagged"), [(1e12, False), (1.1e12, True)])
def test_an_ill_conditioned_fit_is_flagged(condition: float, flagged: bool) -> None:
    text = one_line(beta_table(replace(a_beta(), condition_number=condition)))
    assert ("ILL-CONDITIONED" in text) is flagged
    assert "FALLBACK" not in text


def test_variance_gives_every_mode_with_errors_and_calls_in_sample_flattering() -> None:
    table = variance_table(a_variance())
    text = one_line(table)
    assert "m0003: 4 whole rounds, 2,048 responses, 81,234 tokens, beta version 4" in text
    assert "in-sample," in shown(table) and "flattering" in shown(table)
    assert "in-sample: mean square of version 5" in text
    assert row(table, "none").split() == ["none", "412.3", "1", "172.1", "411.1"]
    assert row(table, "constant").split() == ["constant", "118.2", "0.2867", "±", "0.0010", "115.8", "117.3"]
    in_use = ["*", "regression", "(in", "use)"]
    assert row(table, "regression").split() == [*in_use, "17.91", "0.0434", "±", "0.0010", "17.55", "17.04"]
    for expected in ("norm_debiased 2.81", "norm_raw 3.214", "norm_sq_debiased 7.921", "trace_cov 4,813", "snr 3.37"):
        assert expected in text, expected


def test_variance_before_the_first_round_says_so_and_shows_in_sample_alone() -> None:
    none_yet = replace(a_variance(), rounds=0, sequences=0, tokens=0, **NO_ESTIMATES)
    table = variance_table(none_yet)
    assert "m0003: no whole round yet" in one_line(table)
    assert row(table, "regression").split() == ["regression", "17.04"]
    assert "ratio" not in shown(table)
    assert "Gradient" not in shown(table)
    for in_sample, version in (({}, None), (dict.fromkeys(none_yet.in_sample), 0)):
        nothing = one_line(variance_table(replace(none_yet, in_sample=in_sample, in_sample_version=version)))
        assert nothing == "m0003: no whole round yet: estimates come with the first"


def test_variance_warns_of_a_baseline_in_use_that_is_clearly_worse() -> None:
    assert "read this" not in shown(variance_table(a_variance()))
    text = one_line(variance_table(replace(a_variance(), mode="constant")))
    assert "WORSE BASELINE: constant" in text and "set estimator.baseline.mode to regression" in text


def test_variance_of_what_has_ended_has_no_in_sample_column() -> None:
    table = variance_table(replace(a_variance(), in_sample={}, in_sample_version=None))
    assert row(table, "constant").split() == ["constant", "118.2", "0.2867", "±", "0.0010", "115.8"]
    assert "in-sample" not in shown(table)


def test_a_mode_without_figures_is_not_available_and_breaks_nothing() -> None:
    variance = a_variance()
    bare = {
        "advantage_mean_square": {"none": 412.3},
        "advantage_mean_square_ratio": {"constant": Estimate(0.28)},
        "gradient": Gradient(norm_raw=3.2, why_null="needs two commits"),
        "in_sample": {"none": 411.1, "constant": None},
    }
    table = variance_table(replace(variance, **bare))
    assert row(table, "constant").split() == ["constant", "n/a", "0.2800", "±", "n/a", "115.8", "n/a"]
    assert "n/a" in row(table, "snr")
    assert "needs two commits" in one_line(table)


def test_results_give_a_row_to_each_measurement() -> None:
    done = replace(an_info(), state="done", finished="2026-05-01T12:30:00+00:00", exit_code=0, rounds=40)
    queued = replace(
        an_info(), id="m0005", state="queued", started=None, rounds=0, sequences=0, entropy=None, gradient=None
    )
    table = results_table([done, replace(an_info(), id="m0004", adapter="/adapters/lora-7"), queued])
    entries = row(table, "m0003").split()
    assert shown(table).splitlines()[1].split() == [
        "id", "checkpoint", "state", "rounds", "responses", "nats", "norm_debiased", "snr", "when,", "UTC",
    ]  # fmt: skip
    assert entries[2:] == ["done", "40", "1,024", "28.41", "±", "0.62", "2.81", "3.37", "05-01", "12:30"]
    assert row(table, "m0004").split()[-2:] == ["05-01", "12:03"]
    assert row(table, "m0005").split()[2:] == ["queued", "0", "0", "n/a", "n/a", "n/a", "05-01", "11:58"]
    text = "".join(shown(table).split())
    assert "+lora-7" in text
    assert "/checkpoints" not in text


@pytest.mark.parametrize("norm_sq", [-0.1, 0.0, None])
def test_a_norm_that_is_lost_in_the_noise_is_not_replaced_by_another(norm_sq: float | None) -> None:
    info = an_info()
    assert info.gradient is not None
    gradient = replace(info.gradient, norm_debiased=None, norm_sq_debiased=norm_sq, snr=None)
    table = results_table([replace(info, gradient=gradient)])
    assert row(table, "m0003").split()[-4:-2] == ["n/a", "n/a"]
    assert "3.21" not in shown(table), "the norm with its noise is another thing"
    assert "norm_debiased n/a: not above the noise, or not known" in one_line(table)
    assert "n/a:" not in shown(results_table([info]))


def test_what_did_not_end_well_has_a_line_below() -> None:
    failed = replace(an_info(), state="failed", cause="model.path: got [x]; cut short", exit_code=2)
    cancelled = replace(an_info(), id="m0004", state="cancelled", cause="cancelled before it began", exit_code=130)
    partial = replace(an_info(), id="m0005", state="done", exit_code=3)
    conflicts = replace(an_info(), id="m0006", state="done", exit_code=1)
    table = results_table(
        [replace(an_info(), id="m0002", state="done", exit_code=0), failed, cancelled, partial, conflicts]
    )
    lines = [line.rstrip() for line in shown(table).splitlines()][-4:]
    assert lines[:2] == ["m0003 failed: model.path: got [x]; cut short", "m0004: cancelled before it began"]
    assert lines[2].startswith("m0005: PARTIAL: some shards were given up")
    assert lines[3].startswith("m0006: shards came twice with different bytes")


@pytest.mark.parametrize(
    ("state", "style"),
    [("running", "1;36"), ("done", "32"), ("failed", "1;31"), ("cancelled", "33"), ("queued", None)],
)
def test_states_have_their_colours(state: str, style: str | None) -> None:
    text = shown(results_table([replace(an_info(), state=state)]), colour=True)
    assert (f"\x1b[{style}m{state}" in text) is (style is not None)


def test_an_empty_list_says_how_to_queue_one() -> None:
    assert shown(results_table([])) == "no measurement yet; queue one: probe CHECKPOINT\n"


LONG = "/".join(["", *["a-directory-of-some-length"] * 9, "checkpoint-with-a-name-that-does-not-end-soon-" * 3])


def crowded_status() -> Status:
    info = replace(an_info(), id="a-run-of-quite-a-name-20260501-120311-ab12", checkpoint=LONG, adapter=LONG)
    actors = tuple(replace(actor, node="2001:0db8:85a3:0000:0000:8a2e:0370:7334") for actor in a_status().actors)
    return replace(a_status(), measurement=info, actors=actors, directory=LONG, problem=LONG, last_failure=LONG)


def crowded_results() -> list[MeasurementInfo]:
    info = crowded_status().measurement
    assert info is not None
    return [
        replace(info, rounds=123456, sequences=12345678),
        replace(info, id="m0002", state="cancelled", cause="x " * 80),
    ]


TABLES: dict[str, Callable[[], RenderableType]] = {
    "status": lambda: status_table(crowded_status(), NOW),
    "beta": lambda: beta_table(replace(a_beta(), features=("a_feature_with_a_name_" * 7, "top1", "H"), **UNFITTED)),
    "variance": lambda: variance_table(a_variance()),
    "results": lambda: results_table(crowded_results()),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_keep_to_their_columns_and_need_no_colour(name: str) -> None:
    for width in (40, 60, 80, 100, 200):
        text = shown(TABLES[name](), width)
        assert "\x1b" not in text and "…" not in text
        assert max(len(line.rstrip()) for line in text.splitlines()) <= min(width, 100)


@pytest.mark.parametrize("width", [40, 80, 100])
def test_words_that_do_not_fit_are_broken_and_never_cut(width: int) -> None:
    status = "".join(shown(TABLES["status"](), width).replace("┃", "").split())
    assert status.count(LONG) == 5
    results = "".join(shown(TABLES["results"](), width).split())
    assert "m0002:" + "x" * 80 in results
    beta = "".join(shown(TABLES["beta"](), width).split())
    assert "a_feature_with_a_name_" * 7 in beta.replace("n/a", "")


def test_the_tables_start_nothing_heavy() -> None:
    code = "import sys, ray_probe.cli.tables.service_tables; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) & {"torch", "ray", "matplotlib", "numpy", "transformers", "pydantic"} == set()


def test_a_listing_shows_series_and_step_where_one_is_set() -> None:
    items = [replace(an_info(), series="grpo", step=50, tags={"lr": "1e-5"}), an_info()]
    assert "grpo" in shown(results_table(items)) and "step 50" in shown(results_table(items))
    assert "series" not in shown(results_table([an_info()]))
    assert listing_markdown(items).splitlines()[2].endswith("| grpo | 50 | lr=1e-5 |")
    assert listing_csv(items).splitlines()[1].endswith(",grpo,50,lr=1e-5")
