"""Five baselines on the same responses: advantages and gradients, shard by shard.

Each shard is sampled, scored and recorded once. Then its gradient is formed under each baseline, as a run would: fitted
on all records through the shard's round but its own.

Shape suffixes: S shards, N numbers of the gradient.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from benchmarks.common import prepare_demo
from ray_probe.checkpoints.load import load_model
from ray_probe.checkpoints.tokenizer.load import load_tokenizer
from ray_probe.core.arrays import Array
from ray_probe.core.columns import LOGIT_COLUMNS
from ray_probe.core.estimator.baselines import ShardBaseline
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record, Shape, total
from ray_probe.core.estimator.variance import clustered_ratio, noise_of_products
from ray_probe.gradient.shard_sum import GradientSum
from ray_probe.model.sequences import BatchedSequences
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.shard_record import record_of_results
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.preparation.prepare import PreparedRun
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.sequence_processor import SequenceProcessor

BASELINES = ("none", "constant", "residual_mu", "logits", "recommended")


class Estimate(NamedTuple):
    """A figure and its standard error."""

    value: float
    se: float


@dataclass(frozen=True, eq=False)
class Measured:
    """One baseline on all shards.

    Attributes:
        square_S: sum of A^2 over a shard's tokens, nats^2.
        products_SS: products of the shards' gradients.
    """

    square_S: Array
    products_SS: Array


class Runs:
    """A run whose shards are measured under every baseline.

    Args:
        prepared: the run, with recommended features.
    """

    def __init__(self, prepared: PreparedRun) -> None:
        config, directory = prepared.config, prepared.checkpoint.directory
        self._plan, self._rule = prepared.plan, baseline_rule(config)
        model = load_model(directory, config.model.dtype)
        processor = SequenceProcessor(model, load_tokenizer(directory), config.generation, self._rule.features)
        self._components, self._processor = ProbeComponents(processor), processor
        self._gradient = GradientSum(model, "all")
        rule = replace(self._rule, features=LOGIT_COLUMNS)
        self._fit, self._logit_fit = (PublishedFit.empty(each, "benchmark") for each in (self._rule, rule))
        self.round_S: list[int] = []
        self.tokens_S: list[int] = []
        self.responses_S: list[int] = []
        self.squares: dict[str, list[float]] = {name: [] for name in BASELINES}
        self.gradients: dict[str, list[Array]] = {name: [] for name in BASELINES}

    def run(self) -> None:
        """Measure all rounds of the plan."""
        for number in range(self._plan.round_count or 0):
            collected = [self._collect(shard) for shard in self._plan.round(number)]
            records = [record for _, _, record in collected]
            logits = [of_logits(record, self._rule.recorded) for record in records]
            self._fit = self._fit.after_round(total(records, self._rule.shape))
            self._logit_fit = self._logit_fit.after_round(total(logits, self._logit_fit.rule.shape))
            for sequences, entropies, record in collected:
                self.round_S.append(number)
                self.tokens_S.append(record.tokens)
                self.responses_S.append(sequences.shape[0] * sequences.shape[1])
                for name, baseline in self._baselines(record).items():
                    self._gradient.reset()
                    sums = self._components.accumulate_sum_X(sequences, baseline, entropies=entropies)
                    self._gradient.add_shard()
                    self.squares[name].append(float(sums.advantage[baseline.mode][1]))
                    self.gradients[name].append(self._gradient.bucket(0, self._gradient.layout.size).copy())

    def measured(self) -> dict[str, Measured]:
        """Return the figures of each baseline."""
        found = {}
        for name in BASELINES:
            gradient_SN = np.stack(self.gradients[name])
            products_SS = np.zeros((len(gradient_SN),) * 2)
            for first in range(0, gradient_SN.shape[1], 50_000):
                piece = gradient_SN[:, first : first + 50_000].astype(np.float64)
                products_SS += piece @ piece.T
            found[name] = Measured(np.array(self.squares[name]), products_SS)
        return found

    def _collect(self, shard: Shard) -> tuple[BatchedSequences, list[list[Array]], Record]:
        texts = [ref.text for ref in shard.prompts]
        sequences = self._processor.generate(texts, shard.responses_per_prompt, shard.response_seeds())
        results = self._processor.teacher_force_logprobs(sequences, compute_rb=True, return_baseline_features=True)
        assert results.rb_entropies is not None
        ids_P = np.array([ref.index for ref in shard.prompts])
        record = record_of_results(results, ids_P, "rb_residual", self._rule.cap).without_prompts()
        return sequences, results.rb_entropies, record

    def _baselines(self, own: Record) -> dict[str, ShardBaseline]:
        recommended = self._fit.for_shard(own)
        logits = self._logit_fit.for_shard(of_logits(own, self._rule.recorded))
        assert logits.beta_E is not None
        beta_E = np.zeros(len(self._rule.recorded))
        beta_E[[self._rule.recorded.index(name) for name in LOGIT_COLUMNS]] = logits.beta_E
        return {
            "none": replace(recommended, mode="none"),
            "constant": replace(recommended, mode="constant"),
            "residual_mu": replace(recommended, mode="residual_mu"),
            "logits": replace(recommended, beta_E=beta_E, column_C=None),
            "recommended": recommended,
        }


def of_logits(record: Record, names: tuple[str, ...]) -> Record:
    """Return the record of the columns of logits alone."""
    places = [names.index(name) for name in LOGIT_COLUMNS]
    assert record.shape == Shape(len(names), 1, record.shape.bins)
    return replace(
        record, gram_DD=record.gram_DD[np.ix_(places, places)], cross_DK=record.cross_DK[places],
        bin_feature_CD=record.bin_feature_CD[:, places],
    )  # fmt: skip


def trace_ratio(measured: Measured, reference: Measured, responses_S: Array, round_S: Array) -> Estimate:
    """Return the ratio of the gradient's covariance traces, with a jackknife error.

    The jackknife leaves out one shard of both. Gradients are centred first: the trace of equal rounds stays, and a
    round that lacks a shard does not count the mean gradient as noise.
    """
    shards = np.arange(len(round_S))
    both = [replace(one, products_SS=centred(one.products_SS, responses_S)) for one in (measured, reference)]

    def ratio(kept: Array) -> float:
        traces = [trace(one, responses_S, round_S, kept)[0] for one in both]
        return traces[0] / traces[1]

    left_out = np.array([ratio(np.delete(shards, shard)) for shard in shards])
    spread = ((left_out - left_out.mean()) ** 2).sum() * (len(shards) - 1) / len(shards)
    return Estimate(ratio(shards), float(np.sqrt(spread)))


def centred(products_SS: Array, responses_S: Array) -> Array:
    """Return the products of the gradients less their shards' shares of the mean gradient."""
    share_S = responses_S / responses_S.sum()
    of_total_S = products_SS.sum(axis=1)
    across_SS = np.outer(of_total_S, share_S)
    return np.asarray(products_SS - across_SS - across_SS.T + of_total_S.sum() * np.outer(share_S, share_S))


def trace(measured: Measured, responses_S: Array, round_S: Array, kept: Array) -> tuple[float, float]:
    """Return the covariance trace, times responses, and the SNR, from pairs of rounds."""
    products_SS, responses = measured.products_SS[np.ix_(kept, kept)], responses_S[kept].astype(float)
    apart_SS = round_S[kept][:, None] != round_S[kept][None]
    cross = float(products_SS[apart_SS].sum()) / 2.0
    pairs = float(np.outer(responses, responses)[apart_SS].sum()) / 2.0
    noise = noise_of_products(float(products_SS.sum()), float(responses.sum()), cross, pairs)
    assert noise.trace_cov is not None and noise.snr is not None
    return noise.trace_cov, noise.snr


def square_ratio(numerator_S: Array, denominator_S: Array) -> Estimate:
    """Return a ratio of sums over shards, with its error."""
    value, error = clustered_ratio(numerator_S, denominator_S)
    return Estimate(float(value), float(error))


def run_of(
    checkpoint: str | None, prompts: str | None, responses_per_prompt: int, rounds: int, shards: int, seed: int = 0
) -> Runs:
    """Return a run with shards of 16 responses.

    Args:
        checkpoint: its directory; None: the demo.
        prompts: its prompts file; None: the demo's.
        responses_per_prompt: G.
        rounds: number of rounds.
        shards: in a round.
        seed: of responses, and of the order of prompts.
    """
    shard_prompts = 16 // responses_per_prompt
    settings = {
        "batch.responses_per_prompt": responses_per_prompt, "batch.shard_prompts": shard_prompts,
        "batch.prompts_per_round": shards * shard_prompts, "batch.rounds": rounds, "data.seed": seed,
        "estimator.baseline.features": "recommended", "model.path": checkpoint, "data.prompts": prompts,
    }  # fmt: skip
    return Runs(prepare_demo(*(f"{key}={value}" for key, value in settings.items() if value is not None)))
