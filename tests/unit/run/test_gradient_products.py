"""Windows hold commits that share no prompt, and a run's noise comes from their products, also when it is resumed."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import Job, a_checkpoint, rollout_of, settings

from ray_probe.config import ProbeConfig
from ray_probe.run.gradient_products import GradientProducts, window_of
from ray_probe.run.preparation.plan import Plan
from ray_probe.run.progress import Progress
from ray_probe.run.rounds_file import FinishedRound

TEXTS = tuple("abcdefghijkl")


def plan(prompts_per_round: int, usable: tuple[int, ...] = tuple(range(12))) -> Plan:
    return Plan(TEXTS, usable, 0, prompts_per_round, 2, 2, None, True)


@pytest.mark.parametrize("usable", [tuple(range(12)), (1, 3, 4, 6, 7, 9, 10)])
@pytest.mark.parametrize("size", [1, 3, 5, 20])
def test_the_prompts_of_rounds_are_those_of_their_shards(size: int, usable: tuple[int, ...]):
    dealt = plan(size, usable)
    for first, stop in ((0, 0), (0, 1), (1, 4), (2, 9)):
        shards = [shard for number in range(first, stop) for shard in dealt.round(number)]
        assert dealt.prompts(first, stop) == {ref.index for shard in shards for ref in shard.prompts}


def test_a_commit_that_repeats_a_prompt_of_its_window_starts_the_next():
    dealt, windows, window = plan(4), [], 0
    for number in range(9):
        window = window_of(dealt, window, number, number + 1)
        windows.append(window)
        prompts = [dealt.prompts(earlier, earlier + 1) for earlier in range(window, number + 1)]
        assert sum(map(len, prompts)) == len(frozenset().union(*prompts)), "no two commits of it share a prompt"
    assert windows[:3] == [0, 0, 0] and windows[3] == 3, "a pass has three rounds"


def line(number: int, sequences: int, cross: float | None = None, window: int = 0, first: int = 0) -> FinishedRound:
    entry = FinishedRound(round=number, sequences=sequences, group=(first, number))
    return entry if cross is None else replace(entry, gradient_cross=cross, gradient_window=window)


def test_products_and_pairs_add_up_over_commits_within_windows():
    lines = [
        line(0, 8, 0.0), line(1, 6), replace(line(2, 4, 5.0), group=(1, 2)), line(3, 8, 0.0, window=3, first=3),
        replace(line(4, 2, -1.5, window=3, first=4), gradient_norm_sq=77.0),
    ]  # fmt: skip
    assert GradientProducts.of(lines) == GradientProducts(77.0, 5.0 - 1.5, 8.0 * (6 + 4) + 8.0 * 2)
    assert GradientProducts.of([]) == GradientProducts()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_checkpoint(tmp_path_factory.mktemp("products"))


def small_rounds(checkpoint: Path, rounds: int, commit_rounds: int = 1) -> ProbeConfig:
    """A run over 7 prompts with 2 in a round: its fourth round repeats a prompt."""
    config = settings(checkpoint, output={"commit_rounds": commit_rounds})
    batch = config.batch.model_copy(update={"prompts_per_round": 2, "shard_prompts": 1, "rounds": rounds})
    return config.model_copy(update={"batch": batch})


def of_commits(job: Job) -> tuple[dict[str, Any], list[int], float, float]:
    """Return the run's gradient section, and windows, cross and pairs from the states that each commit left."""
    sums: list[np.ndarray] = []
    responses: list[int] = []
    windows: list[int] = []

    def after_round(progress: Progress) -> None:
        if job.probe.finished_rounds > len(sums):
            sums.append(job.gradient)
            responses.append(sum(entry["sequences"] for entry in job.lines))

    result = job.run(after_round)
    after_round(Progress.outside(""))
    windows = [entry["gradient_window"] for entry in job.lines]
    cross = pairs = 0.0
    for number, window in enumerate(windows):
        before = [sums[place - 1] if place else np.zeros_like(sums[0]) for place in (window, number)]
        counted = [responses[place - 1] if place else 0 for place in (window, number)]
        cross += float((before[1] - before[0]) @ (sums[number] - before[1]))
        pairs += (counted[1] - counted[0]) * (responses[number] - counted[1])
    return result["gradient"], windows, cross, pairs


def test_the_noise_stays_available_when_prompts_come_back(checkpoint: Path, tmp_path: Path):
    gradient, windows, cross, pairs = of_commits(Job.of(small_rounds(checkpoint, 6), tmp_path / "run"))
    assert windows[:3] == [0, 0, 0] and windows[3:] != [0, 0, 0], "a window ends where a prompt comes back"
    assert gradient["norm_sq_debiased"] == pytest.approx(cross / pairs, rel=1e-6)
    assert gradient["trace_cov"] is not None and gradient["why_null"] is None


def test_one_commit_has_no_noise_and_says_why(checkpoint: Path, tmp_path: Path):
    result = Job.of(small_rounds(checkpoint, 3, commit_rounds=3), tmp_path / "run").run()
    assert result["gradient"]["why_null"] == "needs two commits"
    assert {result["gradient"][name] for name in ("norm_sq_debiased", "trace_cov", "snr")} == {None}


@pytest.mark.parametrize("stopped_at", [2, 4, 5])
def test_a_resumed_run_and_two_rollouts_have_the_same_noise(checkpoint: Path, tmp_path: Path, stopped_at: int):
    config = small_rounds(checkpoint, 6)
    expected = Job.of(config, tmp_path / "whole").run()["gradient"]

    def stop(progress: Progress) -> None:
        if progress.round == stopped_at and progress.collected == 1:
            raise KeyboardInterrupt

    stopped = Job.of(config, tmp_path / "stopped", rollouts=2)
    with pytest.raises(KeyboardInterrupt):
        stopped.run(stop)
    resumed = Job(config, stopped.path, [rollout_of(config)])
    found = resumed.run()["gradient"]
    for name in ("norm_raw", "norm_sq_debiased", "trace_cov"):
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
