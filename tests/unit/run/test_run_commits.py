"""Commits of several rounds are all or nothing, a run can be stopped and asked, and no gradient is an error."""

import dataclasses
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.models import ARCHITECTURES, processor, tiny_model
from support.runs import (
    Job,
    a_checkpoint,
    by_name,
    collected,
    misscoring_rollout,
    processor_of,
    rollout_of,
    set_gradient,
    settings,
)

from ray_probe.config import ProbeConfig
from ray_probe.errors import GradientError, ParityError, ProbeError, ShardError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.shard_sum import GradientSum
from ray_probe.gradient.store import GradientStore
from ray_probe.probe_components import ProbeComponents
from ray_probe.run.backend import Stopped
from ray_probe.run.directory import RunDirectory
from ray_probe.run.messages import GradientReport
from ray_probe.run.progress import Progress
from ray_probe.run.round_checks import check_baseline, check_reached


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_checkpoint(tmp_path_factory.mktemp("rollout"))


def with_commits(config: ProbeConfig, commit_rounds: int, **batch: Any) -> ProbeConfig:
    output = config.output.model_copy(update={"commit_rounds": commit_rounds, "save_gradient": True})
    return config.model_copy(update={"output": output, "batch": config.batch.model_copy(update=batch)})


@pytest.mark.parametrize("fit", ["leave_one_out", "in_sample", "lagged"])
def test_commits_of_several_rounds_give_the_answer_of_single_ones(checkpoint: Path, tmp_path: Path, fit: str):
    jobs = {n: Job.of(with_commits(settings(checkpoint, fit=fit), n), tmp_path / str(n), 2) for n in (1, 2, 3, 10)}
    results = {n: job.run() for n, job in jobs.items()}
    single = jobs[1]
    for n, job in jobs.items():
        assert results[n]["beta"] == results[1]["beta"], "bit for bit"
        assert [line["fit"] for line in job.lines] == [line["fit"] for line in single.lines]
        assert results[n]["counts"] == results[1]["counts"]
        assert results[n]["advantage_mean_square"] == results[1]["advantage_mean_square"]
        assert np.linalg.norm(job.gradient - single.gradient) <= 1e-5 * np.linalg.norm(single.gradient)
        assert results[n]["gradient"]["norm_raw"] == pytest.approx(results[1]["gradient"]["norm_raw"], rel=1e-5)
        written = load_file(job.path / "gradient.safetensors")
        mean = by_name(job.backend.layout, job.gradient / results[n]["counts"]["sequences"])
        assert list(mean) == list(job.backend.layout.names) and set(written) == set(mean)
        for name, part in mean.items():
            np.testing.assert_array_equal(written[name], part)
    assert [line["group"] for line in jobs[2].lines] == [[0, 1], [0, 1], [2, 2]], "the last may be shorter"
    assert [line["group"] for line in jobs[10].lines] == [[0, 2]] * 3
    assert sorted(path.name for path in (jobs[2].path / "state").iterdir()) == [
        "gradient-000001.npy", "gradient-000002.npy", *(f"round-{n:06d}.json" for n in range(3)),
    ]  # fmt: skip


@pytest.mark.parametrize("fit", ["leave_one_out", "lagged"])
@pytest.mark.parametrize("stopped_at", ["the second round", "the commit", "the lines"])
def test_a_run_cut_off_in_a_group_keeps_whole_groups_and_goes_on_to_the_same_answer(
    checkpoint: Path, tmp_path: Path, fit: str, stopped_at: str, monkeypatch: pytest.MonkeyPatch
):
    config = with_commits(settings(checkpoint, fit=fit), 2, rounds=4)
    whole = Job.of(config, tmp_path / "whole")
    expected = whole.run()
    stopped = Job.of(config, tmp_path / "stopped")

    def stop_in_round_3(progress: Progress) -> None:
        if stopped_at == "the second round" and progress.round == 3 and progress.accumulated == 1:
            raise KeyboardInterrupt

    def stop_at_the_third(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if len(stopped.lines if (stopped.path / "rounds.jsonl").exists() else []) == 2:
                raise KeyboardInterrupt
            return method(*arguments)

        return call

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        if stopped_at == "the commit":
            patch.setattr(GradientStore, "commit", stop_at_the_third(GradientStore.commit))
        if stopped_at == "the lines":
            patch.setattr(RunDirectory, "commit", stop_at_the_third(RunDirectory.commit))
        stopped.run(stop_in_round_3)
    assert [line["round"] for line in stopped.lines] == [0, 1]
    finished = stopped.probe.finish().to_json()
    assert finished["counts"]["rounds"] == 2 and finished["beta"] == whole.lines[1]["fit"]
    resumed = Job(config, stopped.path, [rollout_of(config)])
    result = resumed.run()
    assert result["beta"] == expected["beta"], "bit for bit"
    assert [line["fit"] for line in resumed.lines] == [line["fit"] for line in whole.lines]
    assert result["counts"] == expected["counts"]
    np.testing.assert_allclose(resumed.gradient, whole.gradient, rtol=0, atol=1e-5 * np.linalg.norm(whole.gradient))


def test_a_budget_that_ends_in_a_group_commits_what_there_is(checkpoint: Path, tmp_path: Path):
    config = with_commits(settings(checkpoint), 5, rounds=None, max_seconds=1e-6)
    job = Job.of(config, tmp_path / "run")
    assert job.run()["counts"]["rounds"] == 1
    assert [line["group"] for line in job.lines] == [[0, 0]]


def test_the_parity_gate_commits_what_there_is_of_a_group(checkpoint: Path, tmp_path: Path):
    config = with_commits(settings(checkpoint), 3)
    job = Job.of(config, tmp_path / "run", rollouts=0)
    job.rollouts.append(misscoring_rollout(config))
    with pytest.raises(ParityError, match="1 rounds are kept"):
        job.run()
    assert [line["round"] for line in job.lines] == [0]


# Stopped, and asked while at work


def test_a_run_that_is_stopped_keeps_what_was_committed_and_can_be_finished(checkpoint: Path, tmp_path: Path):
    job = Job.of(settings(checkpoint), tmp_path / "run")
    seen: list[Progress] = []

    def stop() -> bool:
        return bool(seen) and seen[-1].round == 1 and seen[-1].accumulated == 1

    with pytest.raises(Stopped):
        job.run(seen.append, stop)
    assert not isinstance(Stopped(), ProbeError), "nobody did anything wrong"
    assert seen[-1].accumulated == 1, "at once"
    assert job.probe.finished_rounds == 1
    result = job.probe.finish().to_json()
    assert result["counts"]["rounds"] == 1 and json.loads((job.path / "result.json").read_text()) == result


def test_the_result_so_far_is_that_of_the_committed_rounds_at_any_moment(checkpoint: Path, tmp_path: Path):
    job = Job.of(with_commits(settings(checkpoint), 2), tmp_path / "run")
    found: list[tuple[int, int | None]] = []

    def ask(progress: Progress) -> None:
        result = job.probe.result()
        counted = None if result is None else result.counts.rounds
        if result is not None:
            assert result.beta.version == counted
        found.append((progress.round, counted))

    last = job.run(ask)
    assert set(found) == {(0, None), (1, None), (2, 2)}
    assert job.probe.result().to_json() == last
    assert not (job.path / "result.json.tmp").exists()


# No gradient is no result


def job_with_experts(checkpoint: Path, path: Path, experts: int) -> Job:
    """Two rollouts whose policy has experts that change no probability: the first takes part in one shard alone."""
    config = settings(checkpoint)
    job = Job.of(config, path, rollouts=2)
    for rollout in job.rollouts:
        model = processor_of(rollout).model
        model.experts = torch.nn.ParameterList([torch.nn.Parameter(torch.zeros(())) for _ in range(experts)])
        set_gradient(rollout, GradientSum(model, "all"))
    calls = iter(range(1000))

    def use_once(model: Any, _: Any, __: Any, output: Any) -> None:
        if output.last_hidden_state.requires_grad and next(calls) == 2:
            output.last_hidden_state = output.last_hidden_state + model.experts[0]

    for rollout in job.rollouts:
        model = processor_of(rollout).model
        model.base_model.register_forward_hook(partial(use_once, model))
    return job


def test_a_parameter_that_no_shard_reaches_is_an_error_that_names_it(checkpoint: Path, tmp_path: Path):
    job = job_with_experts(checkpoint, tmp_path / "run", experts=2)
    with pytest.raises(GradientError, match=r"1 of 23 trainable .* \(experts\.1\); .*model\.trainable") as refused:
        job.run()
    assert refused.value.exit_code == 1 and "\n" not in str(refused.value)
    assert not (job.path / "rounds.jsonl").exists() and not list((job.path / "state").iterdir())


def test_a_parameter_that_one_shard_of_one_actor_reaches_is_none(checkpoint: Path, tmp_path: Path):
    job = job_with_experts(checkpoint, tmp_path / "run", experts=1)
    assert job.run()["counts"]["rounds"] == 3


def test_many_unreached_parameters_make_one_line():
    layout = ParameterLayout(tuple(f"layers.{n}." + 200 * "x" for n in range(30)), ((2,),) * 30)
    reports = [GradientReport((), tuple(range(20))), GradientReport((), tuple(range(10, 30)))]
    with pytest.raises(GradientError, match=r"10 of 30 trainable parameters") as refused:
        check_reached(layout, reports)
    assert len(str(refused.value)) < 450
    check_reached(layout, [*reports, GradientReport((), ())])


def test_a_gradient_of_zero_is_an_error(checkpoint: Path, tmp_path: Path):
    config = settings(checkpoint, generation={"top_p": 1e-6})
    job = Job.of(config, tmp_path / "run")
    with pytest.raises(GradientError, match=r"is zero in each of \d+ numbers; nothing was committed; .*top_p"):
        job.run()
    assert job.probe.finished_rounds == 0 and not (job.path / "rounds.jsonl").exists()


def test_a_gradient_under_another_baseline_than_the_plans_is_refused(checkpoint: Path):
    rollout, shards, fit = collected(settings(checkpoint))
    report = rollout.accumulate(shards[0], fit)
    check_baseline(report, fit)
    later = fit.after_round(fit.latest)
    for other in (dataclasses.replace(report, version=0), dataclasses.replace(report, own_left_out=False)):
        with pytest.raises(ShardError, match=r"^shard 0 of round 1: its baseline is .*; the plan asks for version 1"):
            check_baseline(other, fit)
    with pytest.raises(ShardError):
        check_baseline(report, later)
    lagged = dataclasses.replace(fit, rule=dataclasses.replace(fit.rule, fit="lagged"))
    check_baseline(dataclasses.replace(report, round=1, own_left_out=False), lagged)


@pytest.mark.parametrize("mode", ["none", "regression"])
def test_the_score_term_alone_is_a_gradient_too(checkpoint: Path, tmp_path: Path, mode: str):
    config = settings(checkpoint, mode, generation={"rb_requires_grad": False})
    assert Job.of(config, tmp_path / "run").run()["gradient"]["norm_raw"] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_of_a_known_architecture_is_reached(architecture: str):
    policy = processor(tiny_model(architecture, 8), "abcdef", max_new_tokens=4)
    gradient = GradientSum(policy.model, "all")
    sequences = policy.generate(["abc", "f"], 2, [[(0, 0, b, g) for g in range(2)] for b in range(2)])
    ProbeComponents(policy).accumulate_sum_X(sequences, None)
    gradient.add_shard()
    assert gradient.unreached == ()
