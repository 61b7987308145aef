"""A run ends by its plan, its budget or its own error; the error is looked at seldom."""

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from support.runs import TEXTS, Job, a_checkpoint, rollout_of, settings

from ray_probe.config import ProbeConfig
from ray_probe.config.schema import BatchConfig, TargetError
from ray_probe.report.caveats import caveats
from ray_probe.run.comparison.change import Change, ChangeFigure
from ray_probe.run.preparation.plan import Plan
from ray_probe.run.progress import Progress
from ray_probe.run.result import Counts, Entropy, Gradient, Result
from ray_probe.run.rounds_file import FinishedRound
from ray_probe.run.stopping import Look, StopRule, looks

FILE = 64


def rule_of(prompts_per_round: int = 32, prompts: int = FILE, repeat: bool = True, **batch: Any) -> StopRule:
    limits: dict[str, Any] = {"rounds": None, "max_sequences": 100_000} | batch
    config = BatchConfig(prompts_per_round=prompts_per_round, responses_per_prompt=2, **limits)
    texts = tuple(map(str, range(prompts)))
    most = None if config.max_sequences is None else config.max_sequences // (2 * prompts_per_round)
    rounds = min((number for number in (config.rounds, most) if number is not None), default=None)
    plan = Plan(texts, tuple(range(prompts)), 0, prompts_per_round, 2, 4, rounds, repeat)
    return StopRule(config, plan)


def result_of(rounds: int = 4, entropy: Entropy | None = None, gradient: Gradient | None = None) -> Result:
    counts = Counts(rounds=rounds, sequences=64 * rounds)
    return Result(entropy=entropy or Entropy(), gradient=gradient or Gradient(), counts=counts)


@pytest.mark.parametrize(
    ("prompts_per_round", "expected"),
    [(32, [4, 6, 9, 14, 21, 32]), (64, [4, 6, 9, 14, 21, 32]), (16, [4, 6, 9]), (5, [13, 20, 30]), (1, [64, 96, 144])],
)
def test_the_first_look_is_after_4_rounds_and_64_prompts_and_then_where_rounds_grew_by_half(
    prompts_per_round: int, expected: list[int]
):
    assert list(islice(looks(prompts_per_round), len(expected))) == expected
    target = TargetError(of="entropy", relative=0.1)
    rule = rule_of(prompts_per_round, target_error=target)
    assert [rounds for rounds in range(expected[-1] + 1) if rule.is_look(rounds)] == expected
    assert not any(rule_of(prompts_per_round).is_look(rounds) for rounds in range(200)), "without a target"


@pytest.mark.parametrize(
    ("rule", "rounds", "seconds", "expected"),
    [
        (rule_of(rounds=3), 0, 0.0, None),
        (rule_of(rounds=3), 2, 9e9, None),
        (rule_of(rounds=3), 3, 0.0, "rounds"),
        (rule_of(max_sequences=320), 5, 0.0, "max_sequences"),
        (rule_of(max_sequences=320), 4, 0.0, None),
        (rule_of(rounds=3, max_sequences=320), 3, 0.0, "rounds"),
        (rule_of(rounds=8, max_sequences=320), 5, 0.0, "max_sequences"),
        (rule_of(max_seconds=5.0), 1, 5.0, "max_seconds"),
        (rule_of(max_seconds=5.0), 0, 5.0, None),
        (rule_of(repeat=False, max_sequences=None, max_seconds=9.0), 2, 0.0, "prompts"),
    ],
)
def test_the_limit_that_ends_a_run_is_named(rule: StopRule, rounds: int, seconds: float, expected: str | None):
    assert rule.ended_by(rounds, seconds) == expected


@pytest.mark.parametrize(
    ("target", "entropy", "expected"),
    [
        ({"relative": 0.1}, Entropy(8.0, 0.8), Look("entropy", 0.1, None, 0.1)),
        ({"nats": 0.5}, Entropy(8.0, 0.8), Look("entropy", 0.8, None, 0.5)),
        ({"relative": 0.1}, Entropy(), Look("entropy", None, None, 0.1)),
        ({"relative": 0.1}, Entropy(0.0, 0.0), Look("entropy", None, None, 0.1)),
        ({"nats": 0.5}, Entropy(8.0, 0.5, per_sequence_se_within=0.3), Look("entropy", 0.5, 0.4, 0.5)),
    ],
)
def test_the_error_of_the_entropy_is_looked_at(target: dict[str, float], entropy: Entropy, expected: Look):
    rule = rule_of(target_error=TargetError(of="entropy", **target))
    found = rule.look(result_of(entropy=entropy), [])
    assert (found.error, found.floor) == (pytest.approx(expected.error), pytest.approx(expected.floor))
    assert (found.of, found.target) == (expected.of, expected.target)


def test_the_error_of_the_gradient_is_that_of_the_vector_relative_to_its_norm():
    rule = rule_of(prompts=512, target_error=TargetError(of="gradient", relative=0.3))
    gradient = Gradient(norm_debiased=2.0, norm_sq_debiased=4.0, trace_cov=256.0 * 0.36)
    assert rule.look(result_of(gradient=gradient), []).error == pytest.approx(0.3)
    assert rule.look(result_of(gradient=Gradient(norm_sq_debiased=-1.0, trace_cov=9.0)), []).error is None
    unknown = rule.look(result_of(gradient=Gradient(why_null="needs two commits")), [])
    assert unknown == Look("gradient", None, None, 0.3)


def test_what_more_passes_leave_of_the_gradients_error_follows_from_two_numbers_of_passes():
    """Variance of the mean: 1.0 between prompts, 3.0 / passes within."""
    norm_sq, rule = 4.0, rule_of(target_error=TargetError(of="gradient", relative=0.3))
    rounds = [FinishedRound(round=n, sequences=64, group=(n, n)) for n in range(4)]
    rounds[1] = FinishedRound(round=1, sequences=64, group=(1, 1), gradient_norm_sq=(norm_sq + 1.0 + 3.0) * 128**2)
    gradient = Gradient(norm_debiased=2.0, norm_sq_debiased=norm_sq, trace_cov=(1.0 + 3.0 / 2) * 256)
    look = rule.look(result_of(gradient=gradient), rounds)
    assert look.error == pytest.approx(2.5**0.5 / 2.0) and look.floor == pytest.approx(1.0 / 2.0)
    assert look.verdict == "target_out_of_reach"
    assert rule.look(result_of(3, gradient=gradient), rounds[:3]).floor is None, "before the second pass is over"


@pytest.mark.parametrize(
    ("error", "floor", "verdict"),
    [
        (0.1, None, "target_error"), (0.05, 0.2, "target_error"), (0.2, None, None), (0.2, 0.1, None),
        (0.2, 0.15, "target_out_of_reach"), (None, None, None),
    ],
)  # fmt: skip
def test_a_look_ends_the_run_or_lets_it_go_on(error: float | None, floor: float | None, verdict: str | None):
    assert Look("entropy", error, floor, 0.1).verdict == verdict


# Whole runs


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_checkpoint(tmp_path_factory.mktemp("stopping"))


def until(checkpoint: Path, target: dict[str, Any] | None, commit_rounds: int = 1, **limits: Any) -> ProbeConfig:
    config = settings(checkpoint, output={"commit_rounds": commit_rounds})
    batch = {
        "prompts_per_round": 5, "responses_per_prompt": 2, "shard_prompts": 5, "rounds": None, "target_error": target,
        "max_sequences": 210, **limits,
    }  # fmt: skip
    return config.model_copy(update={"batch": BatchConfig.model_validate(batch)})


def plan_for(config: ProbeConfig) -> Plan:
    most = config.batch.max_sequences
    rounds = config.batch.rounds if most is None else most // 10
    return Plan(TEXTS, tuple(range(len(TEXTS))), 4, 5, 2, 5, rounds, True)


@pytest.fixture(autouse=True)
def budgeted_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("support.runs.plan_of", plan_for)


@pytest.mark.parametrize("commit_rounds", [1, 4])
def test_a_run_ends_at_the_first_look_whose_error_is_small_enough(
    checkpoint: Path, tmp_path: Path, commit_rounds: int
):
    notes: list[str] = []
    job = Job.of(until(checkpoint, {"of": "entropy", "nats": 100.0}, commit_rounds), tmp_path / "run")
    result = job.run(lambda progress: notes.append(progress.note) if progress.note else None)
    assert (result["counts"]["rounds"], result["stopped_by"]) == (13, "target_error")
    assert [note for note in notes if "error of the entropy after 13 rounds" in note and note.endswith(": reached")]
    assert any(text.startswith("STOPPED BY ITS OWN ERROR") for text in caveats(Result.from_json(result)))


def test_a_budget_ends_a_run_whose_target_is_too_small(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(StopRule, "_passes", lambda rule, result: 1.0)  # else the prompts themselves are not enough
    result = Job.of(until(checkpoint, {"of": "gradient", "relative": 1e-9}), tmp_path / "run").run()
    assert (result["counts"]["rounds"], result["stopped_by"]) == (21, "max_sequences")
    assert any(text.startswith("TARGET NOT REACHED: max_sequences") for text in caveats(Result.from_json(result)))


def test_a_target_below_what_the_prompts_allow_ends_the_run_and_says_so(checkpoint: Path, tmp_path: Path):
    result = Job.of(until(checkpoint, {"of": "entropy", "nats": 1e-6}), tmp_path / "run").run()
    assert (result["counts"]["rounds"], result["stopped_by"]) == (13, "target_out_of_reach")
    assert any(text.startswith("TARGET OUT OF REACH") for text in caveats(Result.from_json(result)))


def test_a_run_that_ended_by_its_error_ends_at_once_when_it_is_resumed(checkpoint: Path, tmp_path: Path):
    config = until(checkpoint, {"of": "entropy", "nats": 100.0})
    first = Job.of(config, tmp_path / "run")
    expected = first.run()
    again = Job(config, first.path, [rollout_of(config)])
    started: list[Progress] = []
    assert again.run(started.append) == expected and not started


def test_an_unfinished_run_is_stopped_by_nothing(checkpoint: Path, tmp_path: Path):
    job = Job.of(until(checkpoint, None, rounds=3, max_sequences=None), tmp_path / "run")

    def stop(progress: Progress) -> None:
        if progress.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.run(stop)
    assert job.probe.finish().stopped_by is None
    assert Job(job.config, job.path, job.rollouts).run()["stopped_by"] == "rounds"


@pytest.mark.parametrize(
    ("target", "total", "expected"),
    [
        ({"nats": 0.05}, ChangeFigure(-0.4, 0.06), Look("change", 0.06, None, 0.05)),
        ({"nats": 0.05}, ChangeFigure(0.0, 0.04), Look("change", 0.04, None, 0.05)),
        ({"relative": 0.1}, ChangeFigure(-0.4, 0.02), Look("change", 0.05, None, 0.1)),
        ({"relative": 0.1}, ChangeFigure(0.0, 0.02), Look("change", None, None, 0.1)),
        ({"nats": 0.05}, ChangeFigure(), Look("change", None, None, 0.05)),
    ],
)
def test_the_error_of_a_change_is_looked_at(target: dict[str, float], total: ChangeFigure, expected: Look):
    rule = rule_of(target_error=TargetError(of="change", **target))
    look = rule.look(replace(result_of(), change=Change(total=total)), [])
    assert (look.of, look.floor, look.target) == (expected.of, expected.floor, expected.target)
    assert look.error == (None if expected.error is None else pytest.approx(expected.error))
    assert look.verdict == ("target_error" if look.error is not None and look.error <= look.target else None)
