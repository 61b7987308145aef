"""Columns of siblings and of the position's mean leave the gradient unbiased, to 1e-9; the slips that bias it do so.

Two shards hold one use of a prompt each, with two responses. Each shard's baseline is fitted on the other's record. The
mean over all combinations of responses is compared with the gradient of the enumerated J.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from support.enumeration import enumerate_policy, flat_gradient
from support.models import processor, tiny_gpt2

from ray_probe.core.columns import recommended
from ray_probe.core.estimator.baselines import TARGET, BaselineRule, ShardBaseline
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record, record_of_tokens, with_prompts
from ray_probe.core.estimator.ridge import position_means
from ray_probe.model.micro_batches import to_float64
from ray_probe.model.sequences import BatchedSequences, LogprobResults, pack_sequences
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.shard_record import record_of_results

CAP, VOCABULARY, TEMPERATURE = 2, 3, 1.3
COLUMNS = recommended(2)
RULE = BaselineRule("regression", "leave_one_out", 1e-3, 0.9, COLUMNS, CAP)
PROMPTS = ([1, 2], [2, 2, 1])
TOLERANCE = 1e-9

Pair = tuple[tuple[int, ...], tuple[int, ...]]
Served = Iterator[tuple[float, ShardBaseline]]


class Shards:
    """All shards of one use of a prompt with two responses, and their exact weights.

    Args:
        prompt: token ids.
        top_p: of the policy.
        estimator: `rb_residual` or `naive`.
    """

    def __init__(self, prompt: list[int], top_p: float, estimator: str = "rb_residual") -> None:
        self.prompt = prompt
        self.model = tiny_gpt2(VOCABULARY, seed=3)
        policy = {"top_p": top_p, "temperature": TEMPERATURE, "max_new_tokens": CAP, "tf_batch_size": 1}
        self.processor = processor(self.model, "ab", features=COLUMNS, **policy)
        self.components = ProbeComponents(self.processor, estimator)
        self.exact = enumerate_policy(self.model, prompt, CAP, TEMPERATURE, top_p)
        weights = dict(zip(self.exact.responses, self.exact.probabilities, strict=True))
        assert len(weights) >= 3, "the nucleus must leave something to choose"
        self.pairs: dict[Pair, float] = {(y, z): weights[y] * weights[z] for y, z in product(weights, weights)}
        self.expected = 2.0 * self.exact.gradient  # of the sum over two responses

    def sequences(self, pair: Pair) -> BatchedSequences:
        return pack_sequences([self.prompt], [list(pair)])

    def results(self, pair: Pair, with_grad: bool = True) -> LogprobResults:
        return self.processor.teacher_force_logprobs(
            self.sequences(pair), with_grad, compute_rb=True, return_baseline_features=True
        )

    def record(self, pair: Pair) -> Record:
        results = self.results(pair, with_grad=False)
        made = record_of_results(results, np.array([0]), self.components.estimator, CAP)
        return Record.unpack(made.pack())

    def bias(self, mean: torch.Tensor) -> float:
        return float((mean - self.expected).norm() / self.expected.norm())

    def mean(
        self, served: Callable[[Pair], Served], see: Callable[[LogprobResults], LogprobResults] = lambda x: x
    ) -> torch.Tensor:
        """Return the mean of loss_X's gradient over all pairs, each with its baselines and their probabilities."""
        losses = []
        for pair, probability in self.pairs.items():
            results = see(self.results(pair))
            losses += [
                probability * share * self.components._build_X_loss_rb_residual(results, baseline)
                for share, baseline in served(pair)
            ]
        torch.stack(losses).sum().backward()
        return flat_gradient(self.model)


def left_out(own: Record, other: Record) -> ShardBaseline:
    return PublishedFit.empty(RULE, "toy").after_round(own + other).for_shard(own)


def served_by(shards: Shards, others: Shards, serve: Callable[[Record, Record], ShardBaseline] = left_out) -> Callable:
    """Return, for a pair of `shards`, its baselines over all pairs of `others`."""
    records = {pair: others.record(pair) for pair in others.pairs}

    def served(pair: Pair) -> Served:
        own = shards.record(pair)
        for other, probability in others.pairs.items():
            yield probability, serve(own, records[other])

    return served


@pytest.mark.parametrize("estimator", ["rb_residual", "naive"])
@pytest.mark.parametrize("other_prompt", [0, 1], ids=["the same prompt", "another prompt"])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_the_mean_over_all_responses_of_two_shards_is_the_gradient(top_p: float, other_prompt: int, estimator: str):
    shards = Shards(PROMPTS[0], top_p, estimator)
    others = Shards(PROMPTS[other_prompt], top_p, estimator)
    assert shards.bias(shards.mean(served_by(shards, others))) < TOLERANCE


def test_the_gradient_accumulated_response_by_response_has_the_same_mean():
    shards = Shards(PROMPTS[0], 0.8)
    served = served_by(shards, shards)
    mean = torch.zeros_like(shards.expected)
    for pair, probability in shards.pairs.items():
        for share, baseline in served(pair):
            shards.components.accumulate_sum_X(shards.sequences(pair), baseline)
            mean += probability * share * flat_gradient(shards.model)
    assert shards.bias(mean) < TOLERANCE


def test_the_columns_are_in_use():
    shards = Shards(PROMPTS[0], 1.0)
    for column in ("sibling_mu", "sibling_total", "entropy_so_far"):
        values = [
            to_float64(response_TD)[:, COLUMNS.index(column)]
            for pair in shards.pairs
            for response_TD in shards.results(pair, with_grad=False).baseline_feats_torch[0]
        ]
        assert len(set(np.concatenate(values).round(9))) > 1, column
    first, *_, last = shards.pairs
    baseline = left_out(shards.record(first), shards.record(last))
    assert baseline.column_C is not None and baseline.column_C[0] != 0 and baseline.beta_E[-1] != 0
    assert len(baseline.beta_E) == len(COLUMNS)


def test_control_a_response_inside_its_own_sibling_mean_is_biased():
    shards = Shards(PROMPTS[0], 1.0)
    column = COLUMNS.index("sibling_mu")

    def with_itself(results: LogprobResults) -> LogprobResults:
        tables = [table_TD.clone() for table_TD in results.baseline_feats_torch[0]]
        for table_TD, entropy_T in zip(tables, results.rb_entropies[0], strict=True):
            own_T = np.cumsum(entropy_T[::-1])[::-1] - entropy_T
            table_TD[:, column] = (table_TD[:, column] + torch.from_numpy(own_T)) / 2.0
        return replace(results, baseline_feats_torch=[tables])

    assert shards.bias(shards.mean(served_by(shards, shards), with_itself)) > 1e-3


def test_control_a_position_mean_that_holds_the_own_record_is_biased():
    shards = Shards(PROMPTS[0], 1.0)

    def with_own(own: Record, other: Record) -> ShardBaseline:
        return replace(left_out(own, other), column_C=position_means(own + other)[:, TARGET])

    assert shards.bias(shards.mean(served_by(shards, shards, with_own))) > 1e-3


def test_control_a_use_of_a_prompt_split_over_two_shards_is_biased():
    shards = Shards(PROMPTS[0], 1.0)

    def half(results: LogprobResults, g: int) -> Record:
        """Return the record of one of the two responses, with the columns of the other."""
        entropy_T = results.rb_entropies[0][g]
        target_T = np.cumsum(entropy_T[::-1])[::-1] - entropy_T
        phi_TD = to_float64(results.baseline_feats_torch[0][g])
        tokens = record_of_tokens(phi_TD, target_T[:, None], np.arange(len(entropy_T)), CAP)
        return with_prompts(tokens, np.array([0]), np.array([[1.0, entropy_T.sum(), len(entropy_T)]]))

    losses = []
    for pair, probability in shards.pairs.items():
        results = shards.results(pair)
        records = [half(results, g) for g in range(2)]
        for g in range(2):
            baseline = left_out(records[g], records[1 - g])
            terms = [shards.components.response_terms(results, 0, k, baseline) for k in range(2)]
            log_q_T, entropy_T = results.logprobs[0][g], results.rb_entropies_torch[0][g]
            score = (torch.from_numpy(terms[g].advantage_T) * log_q_T).sum()
            losses.append(probability * (score + entropy_T.sum()))
    torch.stack(losses).sum().backward()
    assert shards.bias(flat_gradient(shards.model)) > 1e-3
