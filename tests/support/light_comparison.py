"""What the rollout of a comparison does, without a model: numpy only.

It obeys the rules of `ray_probe.rollout.comparison.Comparison`. What a response is, and what either policy says of it,
follows from its seed alone; its change depends on the baselines that it was given, so that another fit, a lost shard or
a doubled one shows in the sums.

Shape suffixes: S the two policies (A, B), T tokens, D features, K targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import mu_hat_by_mode
from ray_probe.core.estimator.change import ENTROPY, SIDES, ComparedResponse
from ray_probe.core.estimator.change_sums import ChangeSums
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.records import Record, record_of_tokens, with_prompts
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.rollout.shards import GroupShards
from ray_probe.run.messages import Collected, Delivery, GradientReport, Receipt, ShardSums, SumsX
from ray_probe.run.preparation.plan import Shard
from ray_probe.system.versions import made_on
from support.light_rollout import LightRollout

VOCABULARY = 50


@dataclass(eq=False)
class _Held:
    record: Record
    responses: list[list[ComparedResponse]]
    prompt_ids_P: np.ndarray


def response_of(seed: Sequence[int], side: int, cap: int) -> ComparedResponse:
    numbers = np.random.default_rng(seed)
    length = int(numbers.integers(1, cap + 1))
    entropy_ST = numbers.gamma(2.0, 0.5, (len(SIDES), length))
    log_q_ST = -numbers.gamma(2.0, 0.5, (len(SIDES), length))
    return ComparedResponse.of(side, log_q_ST, entropy_ST, numbers.random((len(SIDES), length)) < 0.02)


def columns_of(response: ComparedResponse, cap: int) -> Array:
    mean_T = response.mean_entropy_T
    return np.stack([mean_T, np.exp(-mean_T), np.arange(response.length) / cap], axis=1)


class LightComparison(LightRollout):
    """What `ray_probe.rollout.comparison.Comparison` is, without a model."""

    layout = ParameterLayout((), ())

    def __init__(self, *given, **named) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*given, **named)
        self._shards = GroupShards[_Held]()

    def begin(self, group: str) -> None:
        self._shards.begin(group)

    def collect(self, shard: Shard, held_positions: int = 0) -> Collected:
        cap = self._rule.cap
        halves = [[[(seed, side) for seed in seeds] for seeds in shard.response_seeds(side)] for side in (0, 1)]
        responses = [[response_of(*one, cap) for one in a + b] for a, b in zip(*halves, strict=True)]
        flat = [one for group in responses for one in group]
        self._work([])
        ids_P = np.array([ref.index for ref in shard.prompts], np.int64)
        tokens = record_of_tokens(
            np.concatenate([columns_of(one, cap) for one in flat]),
            np.concatenate([one.target_TK for one in flat]),
            np.concatenate([np.arange(one.length) for one in flat]),
            cap,
        )
        rows = [
            (len(group), sum(one.entropy_ST[one.side].sum() for one in group), sum(one.length for one in group))
            for group in responses
        ]
        record = with_prompts(tokens, ids_P, np.array(rows))
        self._shards.held[shard.key] = _Held(record.without_prompts(), responses, ids_P)
        delivery = Delivery(
            self._policy_id, self._rule.features, shard.round, shard.index, record.pack(), made_on("cpu", 1)
        )
        return Collected(delivery, _parity(record.tokens), record.tokens, 0.0, 0.0)

    def acknowledge(self, shard: Shard, receipt: Receipt) -> None:
        self._shards.acknowledge(shard, receipt)

    def accumulate(self, shard: Shard, fit: PublishedFit) -> ShardSums:
        if shard.key in self._shards.added:
            return self._shards.added[shard.key]
        held, cap = self._shards.waiting(shard), self._rule.cap
        own = held.record if fit.round >= shard.round and fit.rule.fit == "leave_one_out" else None
        baselines = [fit.for_shard(own, target) for target in range(len(SIDES))]
        sums = SumsX.empty(len(held.prompt_ids_P), cap)
        tokens = [sum(one.length for group in held.responses for one in group if one.side == side) for side in (0, 1)]
        change = replace(ChangeSums.zero(cap, VOCABULARY), parity=(_parity(tokens[0]), _parity(tokens[1])))
        for place, (prompt, group) in enumerate(zip(held.prompt_ids_P.tolist(), held.responses, strict=True)):
            mu_hats = []
            for one in group:
                phi_TD, at_T, target_T = columns_of(one, cap), np.arange(one.length), one.target_TK[:, ENTROPY]
                mu_hat_TK = np.stack([base.mu_hat(base.mode, at_T, phi_TD) for base in baselines], axis=1)
                left = {mode: target_T - mu for mode, mu in mu_hat_by_mode(baselines[0], at_T, phi_TD).items()}
                entropy, ended = one.entropy_ST[one.side].sum(), one.length < cap
                sums.add_response(place, entropy, ended, target_T, mu_hat_TK[:, ENTROPY], left, cap)
                change.truncated_2[one.side] += not ended
                mu_hats.append(mu_hat_TK)
            change.add_use(prompt, group, mu_hats, cap)
        sums.change = change
        fitted, ids_P = baselines[0].fitted, held.prompt_ids_P
        report = ShardSums(shard.round, shard.index, fit.version, own is not None, fitted, ids_P, sums, 0.0, 0.0)
        return self._shards.finish(shard, report)

    def gradient_report(self, group: str) -> GradientReport:
        return GradientReport(self._shards.of(group), ())

    def bucket(self, start: int, stop: int, *others: Array) -> Array:
        assert not others, "a gradient of no number has no bucket"
        return np.zeros(stop - start)


def _parity(tokens: int) -> ParityStats:
    nothing_T = np.zeros(tokens)
    return ParityStats.of(nothing_T, nothing_T, nothing_T.astype(bool))
