"""Three estimators of the change from the demo to an update, on the same prompts.

Shape suffixes: P prompts.
"""

import functools
import operator
import time
from collections.abc import Sequence
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
from ray_probe.model.sequences import BatchedSequences, pack_sequences
from ray_probe.rollout.builder import RolloutBuilder
from ray_probe.rollout.comparison import Comparison
from ray_probe.run.comparison.change import Change
from ray_probe.run.comparison.estimates import change_estimate
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.preparation.prepare import PreparedRun
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.sequence_processor import SequenceProcessor

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
    """Return the ratio of two standard errors, with a jackknife error.

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
    started = time.monotonic()
    common = sampled(comparison.processors[1], shards, 0)
    for side, processor in enumerate(comparison.processors):
        sample_at_once(processor, shards, side)
    sample_s = time.monotonic() - started
    common_P = entropy_by_prompt(comparison.processors[1], common)
    sums = compare(prepared, comparison, shards)
    seconds = {"sample": sample_s, "score_and_fit": time.monotonic() - started - sample_s}
    prompt_ids = [ref.index for shard in shards for ref in shard.prompts]
    rows_PF = np.stack([sums.rows[prompt] for prompt in prompt_ids])
    column = {name: rows_PF[:, place] for place, name in enumerate(ROW)}
    values = {
        "mixture": (column["pathwise"] + column["visitation"]) / GROUP,
        "independent": (column["entropy_b"] - column["entropy_a"]) / (GROUP / 2),
        "common": (common_P - column["entropy_a"]) / (GROUP / 2),
    }
    return Measured(change_estimate(sums, cap, shares_baselines=True), values, seconds)


def sampled(processor: SequenceProcessor, shards: Sequence[Shard], side: int) -> BatchedSequences:
    """Return a policy's half of all responses, from the seeds of one side."""
    texts = [ref.text for shard in shards for ref in shard.prompts]
    return processor.generate(texts, GROUP // 2, seeds_of(shards, side))


def seeds_of(shards: Sequence[Shard], side: int) -> list[list[tuple[int, ...]]]:
    """Return the seeds of one side of all shards."""
    return [group for shard in shards for group in shard.response_seeds(side)]


def sample_at_once(processor: SequenceProcessor, shards: Sequence[Shard], side: int) -> None:
    """Sample a policy's half of all responses in large batches.

    From then on `generate` gives them out by their seeds. A response depends on its seed and not on its batch, and
    small shards would sample in small batches.
    """
    found = sampled(processor, shards, side)
    log_q = found.sample_logprobs
    assert log_q is not None
    places = {seed: (b, g) for b, group in enumerate(seeds_of(shards, side)) for g, seed in enumerate(group)}

    def given_out(
        texts: Sequence[str], responses_per_prompt: int, seeds: Sequence[Sequence[tuple[int, ...]]]
    ) -> BatchedSequences:
        rows = [[places[seed] for seed in group] for group in seeds]
        tokens = [[found.tokens(b, g) for b, g in row] for row in rows]
        return pack_sequences(
            [row[0][0].tolist() for row in tokens],
            [[response.tolist() for _, response in row] for row in tokens],
            [[log_q[b][g] for b, g in row] for row in rows],
        )

    processor.generate = given_out


def compare(prepared: PreparedRun, comparison: Comparison, shards: Sequence[Shard]) -> ChangeSums:
    """Return the sums of all shards, each under the fit without it."""
    fitter = Fitter(baseline_rule(prepared.config), prepared.policy_id)
    comparison.begin("benchmark")
    for shard in shards:
        comparison.acknowledge(shard, fitter.accept(comparison.collect(shard).delivery))
    fit = fitter.close_round(0, [shard.index for shard in shards])
    found = [comparison.accumulate(shard, fit) for shard in shards]
    assert all(one.own_left_out for one in found)
    return functools.reduce(operator.add, (one.sums.change for one in found))


def entropy_by_prompt(processor: SequenceProcessor, sequences: BatchedSequences) -> Array:
    """Return the total entropy of each prompt's responses [P], nats."""
    entropies = processor.entropies(sequences)
    return np.array([sum(float(entropy_T.sum()) for entropy_T in group) for group in entropies])
