"""The gradient sees the columns that the record was made of, to the bit, however responses are batched."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.runs import GROUP, POLICY, a_checkpoint, held_of, plan_of, processor_of, settings

from ray_probe.checkpoints.load import load_model
from ray_probe.checkpoints.tokenizer.load import load_tokenizer
from ray_probe.config import ProbeConfig
from ray_probe.core.columns import recommended
from ray_probe.fitter.fitter import Fitter
from ray_probe.gradient.shard_sum import GradientSum
from ray_probe.model.micro_batches import grouped
from ray_probe.model.sequences import LogprobResults
from ray_probe.probe_components import ProbeComponents, ResponseTerms
from ray_probe.rollout.rollout import Rollout
from ray_probe.rollout.shard_record import record_of_results
from ray_probe.run.preparation.plan import Shard
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.sequence_processor import SequenceProcessor

ALL_AT_ONCE = 64


class Watched(ProbeComponents):
    """Remembers the rows of each response that a loss was built from."""

    def response_terms(self, results: LogprobResults, b: int, g: int, baseline: Any) -> ResponseTerms:
        self.rows.append((results.baseline_feats_torch[b][g], results.rb_entropies[b][g], results.entropies[b][g]))
        return super().response_terms(results, b, g, baseline)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_checkpoint(tmp_path_factory.mktemp("columns"))


def watched(config: ProbeConfig) -> tuple[Rollout, Watched]:
    path, rule = Path(config.model.path), baseline_rule(config)
    model = load_model(path, "float32")
    processor = SequenceProcessor(model, load_tokenizer(path), config.generation, rule.features)
    components = Watched(processor, config.estimator.x_estimator_mode)
    return Rollout(components, GradientSum(model, "all"), rule, POLICY, "cpu"), components


def rebuilt(components: Watched, shard: Shard, sequences: Any, config: ProbeConfig) -> np.ndarray:
    """Return the packed record of the rows that the gradient used."""
    places = [place for batch, _ in components.processor._micro_batches(sequences, None) for place in batch]
    assert sorted(places) == list(range(len(components.rows))), "every response once"
    by_place = dict(zip(places, components.rows, strict=True))
    features, rb_entropies, surprisals = (
        grouped([by_place[place][column] for place in sorted(places)], shard.responses_per_prompt)
        for column in range(3)
    )
    results = LogprobResults(baseline_feats_torch=features, rb_entropies=rb_entropies, entropies=surprisals)
    ids_P = np.array([ref.index for ref in shard.prompts], np.int64)
    return record_of_results(results, ids_P, config.estimator.x_estimator_mode, 8).pack()


@pytest.mark.parametrize("estimator", ["rb_residual", "naive"])
@pytest.mark.parametrize("passes", ["two passes", "one pass", "one pass without room"])
@pytest.mark.parametrize("tf_batch_size", [1, 2, 3, ALL_AT_ONCE])
def test_the_record_of_the_gradients_rows_is_the_record_sent(
    checkpoint: Path, tf_batch_size: int, passes: str, estimator: str
):
    config = settings(
        checkpoint, generation={"tf_batch_size": tf_batch_size}, estimator={"x_estimator_mode": estimator}
    )
    assert config.columns == recommended(2)
    rollout, components = watched(config)
    fitter, shards = Fitter(baseline_rule(config), POLICY), plan_of(config).round(0)
    rollout.begin(GROUP)
    held = {"two passes": 0, "one pass": 10**6, "one pass without room": 1}[passes]
    delivered = [rollout.collect(shard, held).delivery for shard in shards]
    for delivery in delivered:
        fitter.accept(delivery)
    fit = fitter.close_round(0, range(len(shards)))
    for shard, delivery in zip(shards, delivered, strict=True):
        sequences, components.rows = held_of(rollout)[shard.key].sequences, []
        rollout.accumulate(shard, fit)
        np.testing.assert_array_equal(rebuilt(components, shard, sequences, config), delivery.packed)


def test_the_library_scores_once_more_for_the_columns_of_siblings(checkpoint: Path):
    config = settings(checkpoint)
    rollout, components = watched(config)
    shard, fitter = plan_of(config).round(0)[0], Fitter(baseline_rule(config), POLICY)
    rollout.begin(GROUP)
    delivery = rollout.collect(shard).delivery
    fitter.accept(delivery)
    sequences, components.rows = held_of(rollout)[shard.key].sequences, []
    components.accumulate_sum_X(sequences, fitter.close_round(0, [0]).for_shard(None))
    np.testing.assert_array_equal(rebuilt(components, shard, sequences, config), delivery.packed)


def test_the_columns_of_siblings_are_not_those_of_a_micro_batch_alone(checkpoint: Path):
    """A micro-batch of one response holds no sibling, and the column is not 0 all the same."""
    config = settings(checkpoint, generation={"tf_batch_size": 1})
    rollout, _ = watched(config)
    shard = plan_of(config).round(0)[0]
    rollout.collect(shard)
    results = processor_of(rollout).teacher_force_logprobs(
        held_of(rollout)[shard.key].sequences, return_baseline_features=True
    )
    column = config.columns.index("sibling_total")
    assert all((table_TD[:, column] > 0).all() for group in results.baseline_feats_torch for table_TD in group)


def test_a_held_shard_takes_8_bytes_a_token_for_them(checkpoint: Path):
    config = settings(checkpoint)
    rollout, _ = watched(config)
    shard = plan_of(config).round(0)[0]
    tokens = rollout.collect(shard).tokens
    held = rollout._shards.held[shard.key]
    assert sum(entropy_T.nbytes for group in held.entropies for entropy_T in group) == 8 * tokens
    assert held.record.prompt_rows_P3.nbytes == 0, "its sums are of a fixed size"
