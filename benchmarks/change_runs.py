"""Three estimators of the change between the demo and an update of it, on the same prompts and responses.

Shape suffixes: P prompts.
"""

import functools
import operator
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import prepare_demo
from benchmarks.saving import ROOT
from ray_probe.core.arrays import Array
from ray_probe.core.estimator.change_sums import ROW, ChangeSums
from ray_probe.core.estimator.variance import clustered_ratio
from ray_probe.fitter.fitter import Fitter
from ray_probe.rollout.builder import RolloutBuilder
from ray_probe.rollout.comparison import Comparison
from ray_probe.run.change import Change
from ray_probe.run.change_estimates import change_estimate
from ray_probe.run.plan import Shard
from ray_probe.run.prepare import PreparedRun
from ray_probe.run.prepared import baseline_rule

START = ROOT / "configs" / "models" / "tiny"
GROUP, SHARD_PROMPTS = 4, 4
BUDGET = 512
"""Responses sampled in all, those of both policies together, that errors are scaled to."""
ESTIMATORS = ("mixture", "independent", "common")


@dataclass(frozen=True, eq=False)
class Measured:
    """One update, measured three ways.

    Attributes:
        change: what a comparison reports.
        values: by estimator, each prompt's change, nats a response [P].
        seconds: of sampling, scoring and fitting, by what took them.
    """

    change: Change
    values: dict[str, Array]
    seconds: dict[str, float]

    def figures(self) -> dict[str, Any]:
        """Return the figures to save: an error's scale is in its name."""
        prompts = len(self.values["mixture"])
        scale = float(np.sqrt(prompts * GROUP / BUDGET))
        found = {name: mean_of(value_P) for name, value_P in self.values.items()}
        return {
            "prompts": prompts,
            "responses": prompts * GROUP,
            "kl": {"ab": self.change.kl.ab, "ba": self.change.kl.ba},
            "js": self.change.js,
            "effective_sample_share": self.change.effective_sample_share,
            "estimators": {
                name: {"value": value, "se": error, f"se_at_{BUDGET}": error * scale}
                for name, (value, error) in found.items()
            },
            "error_ratios": {
                f"mixture_to_{other}": error_ratio(self.values["mixture"], self.values[other])
                for other in ESTIMATORS[1:]
            },
            "seconds": self.seconds,
        }


def mean_of(value_P: Array) -> tuple[float, float]:
    """Return the mean over prompts, and its standard error."""
    value, error = clustered_ratio(value_P, np.ones_like(value_P))
    return float(value), float(error)


def error_ratio(value_P: Array, other_P: Array) -> dict[str, float]:
    """Return the ratio of two standard errors, and its error by jackknife over prompts.

    The jackknife leaves a prompt out of both means; the fits stay as they are.
    """
    prompts = len(value_P)
    kept_PP = np.nonzero(~np.eye(prompts, dtype=bool))[1].reshape(prompts, prompts - 1)
    errors = [clustered_ratio(one[kept_PP], np.ones(kept_PP.shape))[1] for one in (value_P, other_P)]
    left_out_P = errors[0] / errors[1]
    spread = ((left_out_P - left_out_P.mean()) ** 2).sum() * (prompts - 1) / prompts
    return {"value": mean_of(value_P)[1] / mean_of(other_P)[1], "se": float(np.sqrt(spread))}


def prepared_comparison(checkpoint: Path, prompts: int) -> PreparedRun:
    """Return the comparison of the demo, A, with an update, B, in one round."""
    settings = {
        "model.path": checkpoint, "compare.against": START, "generation.top_p": 1.0, "generation.temperature": 1.0,
        "generation.max_new_tokens": 64, "generation.gen_batch_size": 128, "batch.prompts_per_round": prompts,
        "batch.responses_per_prompt": GROUP, "batch.shard_prompts": SHARD_PROMPTS, "batch.rounds": 1,
    }  # fmt: skip
    return prepare_demo(*(f"{key}={value}" for key, value in settings.items()))


def measure(checkpoint: Path, prompts: int) -> Measured:
    """Measure the change from the demo to a checkpoint.

    The mixture and the independent measurements share all responses. With common random numbers A's responses are the
    same ones, and B samples its own with their seeds.
    """
    prepared = prepared_comparison(checkpoint, prompts)
    assert prepared.against is not None
    places = [(one.directory, None) for one in (prepared.against, prepared.checkpoint)]
    comparison = RolloutBuilder().compare(prepared.config, places, prepared.policy_id)
    shards, cap = prepared.plan.round(0), prepared.config.generation.max_new_tokens
    sums, seconds = compare(prepared, comparison, shards)
    started = time.monotonic()
    common_P = entropies_with_seeds_of_a(comparison, shards)
    seconds["common"] = time.monotonic() - started
    prompt_ids = [ref.index for shard in shards for ref in shard.prompts]
    rows_PF = np.stack([sums.rows[prompt] for prompt in prompt_ids])
    column = {name: rows_PF[:, place] for place, name in enumerate(ROW)}
    values = {
        "mixture": (column["pathwise"] + column["visitation"]) / GROUP,
        "independent": (column["entropy_b"] - column["entropy_a"]) / (GROUP / 2),
        "common": (common_P - column["entropy_a"]) / (GROUP / 2),
    }
    return Measured(change_estimate(sums, cap, shares_baselines=True), values, seconds)


def compare(
    prepared: PreparedRun, comparison: Comparison, shards: tuple[Shard, ...]
) -> tuple[ChangeSums, dict[str, float]]:
    """Return the sums of all shards, each under the fit without it, and seconds by what took them."""
    fitter = Fitter(baseline_rule(prepared.config), prepared.policy_id)
    comparison.begin("benchmark")
    sample_s = score_s = 0.0
    for shard in shards:
        report = comparison.collect(shard)
        comparison.acknowledge(shard, fitter.accept(report.delivery))
        sample_s, score_s = sample_s + report.generate_s, score_s + report.teacher_force_s
    started = time.monotonic()
    fit = fitter.close_round(0, [shard.index for shard in shards])
    found = [comparison.accumulate(shard, fit) for shard in shards]
    assert all(one.own_left_out for one in found)
    sums = functools.reduce(operator.add, (one.sums.change for one in found))
    return sums, {"sample": sample_s, "score": score_s, "fit_and_sum": time.monotonic() - started}


def entropies_with_seeds_of_a(comparison: Comparison, shards: tuple[Shard, ...]) -> Array:
    """Return each prompt's total entropy of B's responses that take the seeds of A's [P], nats."""
    texts = [ref.text for shard in shards for ref in shard.prompts]
    seeds = [group for shard in shards for group in shard.response_seeds(0)]
    b = comparison.processors[1]
    entropies = b.entropies(b.generate(texts, GROUP // 2, seeds))
    return np.array([sum(float(entropy_T.sum()) for entropy_T in group) for group in entropies])
