"""A series of checkpoints: its points, its changes, and the error of sums over steps."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from support.chains import gradient, step
from support.models import save_checkpoint, tiny_llama

from ray_probe.errors import ConfigError
from ray_probe.run.comparison.chain import read_chain
from ray_probe.run.comparison.change import ChangeFigure, Figure
from ray_probe.run.comparison.estimates import PromptRows
from ray_probe.run.comparison.measured import CheckpointKey, Measured, read_measured
from ray_probe.run.comparison.series_builder import build_series
from ray_probe.run.directory import RunDirectory
from ray_probe.run.series import Series, SeriesChange, SeriesPoint

STEPS = (0, 50, 100)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gradient of the second of three checkpoints, and the comparisons of neighbours."""
    directory = tmp_path_factory.mktemp("series")
    checkpoints = [save_checkpoint(directory / f"checkpoint-{n}", tiny_llama(8, seed=n), "abcdef") for n in STEPS]
    for number, (a, b) in enumerate(pairwise(checkpoints), start=1):
        place = {"name": "train", "step": STEPS[number], "tags": {"lr": "1e-5"}}
        step(directory, number, a, b, series=place)
    gradient(directory, "own", checkpoints[1], series={"name": "train", "step": 50, "tags": {"kind": "own"}})
    return directory


@pytest.fixture(scope="module")
def measured(directory: Path) -> list[Measured]:
    return [read_measured(RunDirectory(directory / name), name) for name in ("own", "step-1", "step-2")]


def test_sums_of_a_series_are_those_of_a_chain_to_the_bit(directory: Path, measured: list[Measured]):
    series, chain = build_series("train", measured), read_chain(directory)
    for change, of_chain in zip(series.changes, chain.steps, strict=True):
        assert change.since_first == of_chain.since_first and change.since_first.se
        assert (change.total, change.pathwise) == (RunDirectory(directory / of_chain.run).result().change.total,
                                                   RunDirectory(directory / of_chain.run).result().change.pathwise)
    assert [(one.first_step, one.last_step) for one in series.changes] == [(None, 50), (50, 100)]


def test_a_point_takes_entropy_from_its_gradient_and_length_from_a_comparison(
    directory: Path, measured: list[Measured]
):
    first, second, third = build_series("train", measured).points
    own, change = (RunDirectory(directory / name).result() for name in ("own", "step-1"))
    assert second.entropy == Figure(own.entropy.per_sequence, own.entropy.per_sequence_se)
    assert second.per_token == Figure(own.entropy.per_token, own.entropy.per_token_se)
    assert (second.snr, second.responses, second.parity_gap) == (
        own.gradient.snr, own.counts.sequences, own.parity.mean_gap)  # fmt: skip
    assert second.length == RunDirectory(directory / "step-1").result().change.length.b and second.length.se
    assert second.measurements == ("own", "step-1", "step-2")
    assert second.tags == {"kind": "own", "lr": "1e-5"}
    assert first.entropy == change.change.entropy_a and first.length == change.change.length.a
    assert (first.step, third.step, first.snr, first.tags) == (None, 100, None, {})
    assert third.responses == change.counts.sequences // 2


def test_a_gradient_alone_has_a_length_without_an_error(measured: list[Measured]):
    (point,) = build_series("train", measured[:1]).points
    assert point.length.value > 0 and point.length.se is None and 0.0 <= point.truncated <= 1.0


def test_a_series_survives_json(measured: list[Measured]):
    series = build_series("train", measured, still_open=2, failed=1)
    assert Series.from_json(series.to_json()) == series and (series.open, series.failed) == (2, 1)


def test_a_run_without_a_result_is_refused_in_one_line(directory: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("manifest.json", "config.yaml"):
        (run / name).write_bytes((directory / "own" / name).read_bytes())
    with pytest.raises(ConfigError, match="no result"):
        read_measured(RunDirectory(run), "run")


PROMPTS, ROUNDS = 6, 3


def key(name: str, content: str | None = None) -> CheckpointKey:
    return CheckpointKey(f"/{name}", None, (content or name, ""))


def compared(a: str, b: str, at: int | None, seed: int, rounds: int = ROUNDS, prompts: int = PROMPTS) -> Measured:
    """A comparison with sums of its own."""
    numbers = np.random.default_rng(seed)
    rows = tuple(
        PromptRows(range(prompts), np.vstack([np.full(prompts, 4.0), numbers.normal(size=(2, prompts))]))
        for _ in range(rounds)
    )
    change = SeriesChange(measurement=f"{a}{b}", total=ChangeFigure(float(seed)))
    return Measured(
        f"{a}{b}", "s", at, {}, key(b), SeriesPoint(checkpoint=f"/{b}"), key(a), SeriesPoint(checkpoint=f"/{a}"),
        change, rows, ("same",),
    )  # fmt: skip


def direct(*steps: Measured, rounds: int = ROUNDS, prompts: int = PROMPTS) -> tuple[float, float]:
    """Sum over steps and its error, prompts as clusters, from all rows."""
    sums_P = sum(one.total_P[:prompts] for measured in steps for one in measured.rounds[:rounds])
    responses_P = np.full(prompts, 4.0 * rounds)
    value = sums_P.sum() / responses_P.sum()
    residual_P = sums_P - value * responses_P
    return value, np.sqrt((residual_P**2).sum() * prompts / (prompts - 1)) / responses_P.sum()


def since(series: Series) -> list[tuple[float | None, float | None]]:
    return [(one.since_first.value, one.since_first.se) for one in series.changes]


def test_the_error_of_a_sum_is_that_of_a_direct_computation():
    ab, bc, cd = compared("a", "b", 1, 1), compared("b", "c", 2, 2), compared("c", "d", 3, 3)
    found = since(build_series("s", [ab, bc, cd]))
    for steps, pair in zip(((ab,), (ab, bc), (ab, bc, cd)), found, strict=True):
        assert pair == pytest.approx(direct(*steps), rel=1e-12)


def test_sums_use_the_rounds_and_prompts_that_all_have():
    ab, bc, cd = compared("a", "b", 1, 1), compared("b", "c", 2, 2, rounds=2), compared("c", "d", 3, 3, prompts=4)
    found = since(build_series("s", [ab, bc, cd]))
    assert found[0] == pytest.approx(direct(ab))
    assert found[1] == pytest.approx(direct(ab, bc, rounds=2))
    assert found[2] == pytest.approx(direct(ab, bc, cd, rounds=2, prompts=4))


def test_after_a_comparison_that_is_missing_there_is_no_sum():
    found = build_series("s", [compared("a", "b", 1, 1), compared("c", "d", 3, 3), compared("d", "e", 4, 4)])
    assert [pair != (None, None) for pair in since(found)] == [True, False, False]
    assert [one.checkpoint for one in found.points] == ["/a", "/b", "/c", "/d", "/e"]


def test_other_prompts_or_sampling_end_the_sum():
    other = replace(compared("b", "c", 2, 2), conditions=("other",))
    found = since(build_series("s", [compared("a", "b", 1, 1), other, compared("c", "d", 3, 3)]))
    assert [pair != (None, None) for pair in found] == [True, False, False]


def test_the_newest_comparison_of_two_checkpoints_counts():
    found = build_series("s", [compared("a", "b", 1, 1), replace(compared("a", "b", 1, 2), name="again")])
    assert [one.total.value for one in found.changes] == [2.0]
    assert found.points[0].measurements == ("ab", "again")


def test_points_are_sorted_by_step_and_those_without_one_stay_in_the_order_of_submission():
    late, early, unknown = compared("b", "c", 200, 1), compared("a", "b", 100, 2), compared("x", "y", None, 3)
    series = build_series("s", [late, unknown, early])
    assert [one.checkpoint for one in series.points] == ["/a", "/b", "/c", "/x", "/y"]
    assert [(one.first_step, one.last_step) for one in series.changes] == [(None, 100), (100, 200), (None, None)]
    nameless = build_series("s", [compared("z", "y", None, 1), compared("y", "a", None, 2)])
    assert [one.checkpoint for one in nameless.points] == ["/z", "/y", "/a"]
    assert all(value is not None for value, _ in since(nameless))


def test_a_is_known_by_its_content_where_it_was_copied_and_not_by_its_place_where_it_was_overwritten():
    moved = replace(compared("b", "c", 2, 2), against=key("pins/b", "b"))
    assert len(build_series("s", [compared("a", "b", 1, 1), moved]).points) == 3
    overwritten = replace(compared("b", "c", 2, 2), against=key("b", "other bytes"))
    found = build_series("s", [compared("a", "b", 1, 1), overwritten])
    assert len(found.points) == 4 and found.changes[1].since_first.value is None
