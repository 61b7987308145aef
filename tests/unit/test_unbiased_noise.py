"""The squared norm from products of commits is unbiased, to 1e-9; from all pairs of shards it is not.

Two commits (rounds) hold two shards of one response each. All combinations of responses are summed with their exact
probabilities. The gradient of a response is affine in beta, so a few backward passes a response give all of them.
"""

from itertools import product

import numpy as np
import pytest
from support.enumeration import enumerate_policy, flat_gradient
from support.models import processor, tiny_gpt2

from ray_probe.core.estimator.baselines import BaselineRule, Fit, ShardBaseline
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record
from ray_probe.core.estimator.variance import gradient_noise, noise_of_products
from ray_probe.model.sequences import pack_sequences
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.shard_record import record_of_results

CAP, VOCABULARY, PROMPT = 2, 3, [1, 2]
FEATURES = ("H", "pos_frac")
RELATIVE = 1e-9


class Responses:
    """All responses of a policy, with their records and their gradients as a function of beta."""

    def __init__(self) -> None:
        model = tiny_gpt2(VOCABULARY, seed=3)
        policy = processor(model, "ab", FEATURES, top_p=0.8, temperature=1.3, max_new_tokens=CAP)
        components = ProbeComponents(policy)
        exact = enumerate_policy(model, PROMPT, CAP, 1.3, 0.8)
        self.probability_Y = np.array(exact.probabilities)
        self.exact = exact.gradient.numpy()
        self.records: list[Record] = []
        gradients = []
        for response in exact.responses:
            sequences = pack_sequences([PROMPT], [[response]])
            results = policy.teacher_force_logprobs(sequences, compute_rb=True, return_baseline_features=True)
            self.records.append(record_of_results(results, np.array([0]), "rb_residual", CAP))
            row = []
            for beta_D in np.vstack([np.zeros(len(FEATURES)), np.eye(len(FEATURES))]):
                baseline = ShardBaseline("regression", 0.0, np.zeros(CAP), beta_D, CAP, True)
                components.accumulate_sum_X(sequences, baseline)
                row.append(flat_gradient(model).numpy())
            gradients.append(row)
        self._gradient_YBN = np.array(gradients)

    def gradient(self, response: int, baseline: ShardBaseline) -> np.ndarray:
        beta_D = np.zeros(len(FEATURES)) if baseline.beta_E is None else baseline.beta_E
        zero_N, *ones = self._gradient_YBN[response]
        return zero_N + sum(beta * (one_N - zero_N) for beta, one_N in zip(beta_D, ones, strict=True))


@pytest.fixture(scope="module")
def responses() -> Responses:
    return Responses()


def expected_norm_sq(responses: Responses, fit: Fit) -> tuple[float, float]:
    """Return the means of both estimates over all runs: pairs of commits, and all pairs of shards."""
    rule = BaselineRule("regression", fit, 1e-3, 0.9, FEATURES, CAP)
    empty = PublishedFit.empty(rule, "toy")
    by_commit = by_shard = 0.0
    for run in product(range(len(responses.records)), repeat=4):
        first, second = run[:2], run[2:]
        after_first = empty.after_round(responses.records[first[0]] + responses.records[first[1]])
        after_second = after_first.after_round(responses.records[second[0]] + responses.records[second[1]])
        used = (empty, after_first) if fit == "lagged" else (after_first, after_second)
        own = [None if fit == "lagged" else responses.records[shard] for shard in run]
        shards = np.stack([
            responses.gradient(shard, used[place // 2].for_shard(own[place])) for place, shard in enumerate(run)
        ])  # fmt: skip
        commits = shards[:2].sum(axis=0), shards[2:].sum(axis=0)
        norm_sq = float((shards.sum(axis=0) ** 2).sum())
        probability = float(np.prod(responses.probability_Y[list(run)]))
        crossed = noise_of_products(norm_sq, 4.0, float(commits[0] @ commits[1]), 4.0)
        paired = gradient_noise(norm_sq, (shards**2).sum(axis=1), np.ones(4))
        by_commit += probability * crossed.norm_sq_debiased
        by_shard += probability * paired.norm_sq_debiased
    return by_commit, by_shard


def test_products_of_commits_are_unbiased_and_all_pairs_of_shards_are_not(responses: Responses):
    exact = float(responses.exact @ responses.exact)
    by_commit, by_shard = expected_norm_sq(responses, "leave_one_out")
    assert by_commit == pytest.approx(exact, rel=RELATIVE)
    assert by_shard > 1.01 * exact


def test_under_lagged_both_are_unbiased(responses: Responses):
    exact = float(responses.exact @ responses.exact)
    by_commit, by_shard = expected_norm_sq(responses, "lagged")
    assert by_commit == pytest.approx(exact, rel=RELATIVE)
    assert by_shard == pytest.approx(exact, rel=RELATIVE)
