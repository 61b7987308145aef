"""The benchmark's five baselines are those of runs of their own, and its errors are those of repetition."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from support.pages import ROOT
from support.runs import Job, a_checkpoint, settings

from ray_probe.core.estimator.modes import MODES
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.totals import merged

SETTINGS: dict[str, dict[str, Any]] = {
    "none": {"mode": "none"},
    "constant": {"mode": "constant"},
    "residual_mu": {"mode": "residual_mu"},
    "logits": {"mode": "regression", "features": "logits"},
    "recommended": {"mode": "regression", "features": "recommended"},
}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "1")  # benchmarks set it for good where it is missing
    return import_module("benchmarks.baseline_runs")


@pytest.mark.parametrize("responses_per_prompt", [1, 3])
def test_each_baseline_is_that_of_a_run_with_its_own_settings(
    benchmark: ModuleType, tmp_path: Path, responses_per_prompt: int
) -> None:
    batch = {"responses_per_prompt": responses_per_prompt, "prompts_per_round": 5, "shard_prompts": 2, "rounds": 3}
    checkpoint = a_checkpoint(tmp_path)

    def config(baseline: dict[str, Any]) -> Any:
        parts = settings(checkpoint, estimator={"baseline": baseline}, model={"dtype": "float64"})
        return parts.model_copy(update={"batch": parts.batch.model_copy(update=batch)})

    runs = benchmark.Runs(prepare(config(SETTINGS["recommended"])))
    runs.run()
    assert set(runs.gradients) == set(SETTINGS)
    for name, baseline in SETTINGS.items():
        job = Job.of(config(baseline), tmp_path / name)
        job.run()
        squares_S = merged(RunDirectory(job.path).restore(3)).advantage_SM2[:, MODES.index(baseline["mode"]), 1]
        np.testing.assert_allclose(runs.squares[name], squares_S, rtol=1e-9)
        np.testing.assert_allclose(sum(runs.gradients[name]), job.gradient, rtol=0, atol=1e-9)


def measured(benchmark: ModuleType, gradient_SN: np.ndarray) -> Any:
    return benchmark.Measured(np.zeros(len(gradient_SN)), gradient_SN @ gradient_SN.T)


def test_the_ratio_of_traces_is_that_of_noises_and_its_error_is_not_below_its_scatter(benchmark: ModuleType) -> None:
    rng, repetitions, shards, numbers, responses = np.random.default_rng(0), 150, 32, 400, 16
    round_S, responses_S = np.repeat(np.arange(4), shards // 4), np.full(shards, responses)
    deviation_N = np.exp(0.5 * rng.normal(size=numbers))
    # With 512 responses the shared mean gives the quiet gradient an SNR near 2, as was measured.
    mean_N = np.sqrt(2 * 0.08 * (deviation_N**2).mean() / responses / (shards * responses))
    ratios = []
    for _ in range(repetitions):
        # Shards differ in size, as sums over few prompts do.
        common_SN, own_SN = rng.normal(size=(2, shards, numbers)) * deviation_N * rng.gamma(2.0, 0.5, (shards, 1))
        quiet, noisy = (
            measured(benchmark, mean_N * responses + deviations_SN)
            for deviations_SN in (0.2 * common_SN + 0.2 * own_SN, common_SN)
        )
        ratios.append(benchmark.trace_ratio(quiet, noisy, responses_S, round_S))
    values, errors = np.array(ratios).T
    assert values.mean() == pytest.approx(0.08, rel=0.03)
    assert 0.9 < np.sqrt((errors**2).mean()) / values.std() < 1.75
