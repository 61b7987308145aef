"""What a rollout does, without a model: numpy only. It obeys the rules of `ray_probe.rollout.rollout.Rollout`.

What a response is follows from its seed alone. The gradient of a shard depends on the shard and on the baseline that it
was given, so that another baseline, a lost shard or a doubled one shows in the sum.

Shape suffixes: T tokens, D features, K directions of the gradient, N numbers of the gradient, P prompts.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from ray_probe.core.estimator.baselines import MODES, BaselineRule, ShardBaseline, mu_hat_by_mode
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.records import Record, bin_of, position_bins, record_of_tokens, with_prompts
from ray_probe.errors import ShardError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.messages import Collected, Delivery, GradientReport, Receipt, ShardKey, ShardSums, SumsX
from ray_probe.run.preparation.plan import Shard
from ray_probe.system.versions import made_on

DIRECTIONS = 6
LAYOUT = ParameterLayout(("embed", "layer.weight", "layer.bias", "head"), ((40, 50), (30, 60), (60,), (50, 24)))

Array = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Response:
    """What sampling and scoring would give: entropies [T] (nats), features [T, D], gradient of log q [T, K]."""

    entropy_T: Array
    phi_TD: Array
    score_TK: Array

    @property
    def position_T(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self.entropy_T))

    @property
    def target_T(self) -> Array:
        """Future entropy, nats."""
        return np.append(np.cumsum(self.entropy_T[:0:-1])[::-1], 0.0)


def response_of(seed: Sequence[int], cap: int) -> Response:
    numbers = np.random.default_rng(seed)
    length = int(numbers.integers(1, cap + 1))
    entropy_T = numbers.gamma(2.0, 0.5, length)
    phi_TD = np.stack([entropy_T, np.exp(-entropy_T), np.arange(length) / cap], axis=1)
    return Response(entropy_T, phi_TD, numbers.normal(0.3, 1.0, (length, DIRECTIONS)))


@lru_cache
def directions_KN() -> Array:
    return np.random.default_rng(0).normal(size=(DIRECTIONS, LAYOUT.size))


@dataclass
class _Held:
    responses: list[list[Response]]
    prompt_ids_P: npt.NDArray[np.int64]
    record: Record


class LightRollout:
    """What `ray_probe.rollout.rollout.Rollout` is, without a model.

    Args:
        rule: how the baseline is formed.
        policy_id: what records are marked with.
        on_progress: told of tokens done.
        shard_s: seconds that each half of a shard takes, told of in small steps.
    """

    layout = LAYOUT
    eos_ids = (0,)

    def __init__(
        self,
        rule: BaselineRule,
        policy_id: str,
        on_progress: Callable[[int], None] = lambda tokens: None,
        shard_s: float = 0.0,
    ) -> None:
        self._rule = rule
        self._policy_id = policy_id
        self._on_progress = on_progress
        self._shard_s = shard_s
        self._group = ""
        self._held: dict[ShardKey, _Held] = {}
        self._added: dict[ShardKey, ShardSums] = {}
        self._sum_N = np.zeros(LAYOUT.size, np.float32)

    def begin(self, group: str) -> None:
        if group != self._group:
            self._group = group
            self._held, self._added = {}, {}
            self._sum_N = np.zeros(LAYOUT.size, np.float32)

    def collect(self, shard: Shard, held_positions: int = 0) -> Collected:
        started = time.monotonic()
        cap = self._rule.cap
        responses = [[response_of(seed, cap) for seed in seeds] for seeds in shard.response_seeds()]
        self._work(responses)
        ids_P = np.array([ref.index for ref in shard.prompts], np.int64)
        flat = [response for group in responses for response in group]
        tokens = record_of_tokens(
            np.concatenate([response.phi_TD for response in flat]),
            np.concatenate([response.target_T for response in flat])[:, None],
            np.concatenate([response.position_T for response in flat]),
            cap,
        )
        record = with_prompts(tokens, ids_P, _rows(responses))
        self._held[shard.key] = _Held(responses, ids_P, record.without_prompts())
        delivery = Delivery(
            self._policy_id, self._rule.features, shard.round, shard.index, record.pack(), made_on("cpu", 1)
        )
        nothing_T = np.zeros(record.tokens)
        parity = ParityStats.of(nothing_T, nothing_T, nothing_T.astype(bool))
        return Collected(delivery, parity, record.tokens, time.monotonic() - started, 0.0)

    def hold_no_graphs(self) -> None:
        pass

    def acknowledge(self, shard: Shard, receipt: Receipt) -> None:
        if receipt.kept is not None:
            self._held[shard.key].record = Record.unpack(receipt.kept).without_prompts()

    def accumulate(self, shard: Shard, fit: PublishedFit) -> ShardSums:
        if shard.key in self._added:
            return self._added[shard.key]
        if shard.key not in self._held:
            raise ShardError(f"{shard.label}: was not collected here; collect it first")
        started = time.monotonic()
        held = self._held[shard.key]
        own = held.record if fit.round >= shard.round and fit.rule.fit == "leave_one_out" else None
        baseline = fit.for_shard(own)
        self._work(held.responses)
        sums, weight_K = _sums_of(held.responses, baseline)
        gradient_N = (weight_K @ directions_KN()).astype(np.float32)
        self._sum_N += gradient_N
        norm_sq = float(gradient_N.astype(np.float64) @ gradient_N.astype(np.float64))
        self._added[shard.key] = result = ShardSums(
            shard.round, shard.index, fit.version, own is not None, baseline.fitted, held.prompt_ids_P, sums, norm_sq,
            time.monotonic() - started,
        )  # fmt: skip
        del self._held[shard.key]
        return result

    def gradient_report(self, group: str) -> GradientReport:
        shards = tuple(sorted(self._added)) if group == self._group else ()
        return GradientReport(shards, () if self._added else tuple(range(len(LAYOUT.names))))

    def bucket(self, start: int, stop: int, *others: Array) -> Array:
        return sum(others, start=self._sum_N[start:stop].copy())

    def _work(self, responses: list[list[Response]]) -> None:
        """Take as long as was asked for, a response after the other."""
        flat = [response for group in responses for response in group]
        for response in flat:
            time.sleep(self._shard_s / len(flat))
            self._on_progress(len(response.entropy_T))


def _rows(responses: list[list[Response]]) -> Array:
    """Of each prompt: responses, total entropy (nats), total length (tokens), [P, 3]."""
    entropies = [[response.entropy_T for response in group] for group in responses]
    return np.array([(len(group), sum(h.sum() for h in group), sum(len(h) for h in group)) for group in entropies])


def _squares(responses: list[list[Response]]) -> Array:
    """Of each prompt, sums over responses of H^2, H T and T^2 [P, 3]."""
    totals = [np.array([(h.entropy_T.sum(), len(h.entropy_T)) for h in group]) for group in responses]
    return np.array([((x[:, 0] ** 2).sum(), (x[:, 0] * x[:, 1]).sum(), (x[:, 1] ** 2).sum()) for x in totals])


def _sums_of(responses: list[list[Response]], baseline: ShardBaseline) -> tuple[SumsX, Array]:
    """What a shard's report holds, and the weight of each direction in its gradient [K]."""
    cap, bins = baseline.cap, position_bins(baseline.cap)
    counts = _rows(responses), _squares(responses), 0, 0, {mode: np.zeros(2) for mode in MODES}
    sums = SumsX(*counts, *(np.zeros(bins) for _ in range(3)))
    weight_K = np.zeros(DIRECTIONS)
    for response in (response for group in responses for response in group):
        position_T, phi_TD, target_T = response.position_T, response.phi_TD, response.target_T
        mu_hat_T = baseline.mu_hat(baseline.mode, position_T, phi_TD)
        for mode, mode_mu_T in mu_hat_by_mode(baseline, position_T, phi_TD).items():
            sums.advantage[mode] += ((target_T - mode_mu_T).sum(), ((target_T - mode_mu_T) ** 2).sum())
        for total_B, values in (
            (sums.bin_weight_B, 1.0), (sums.bin_target_B, target_T), (sums.bin_mu_hat_B, mu_hat_T),
        ):  # fmt: skip
            np.add.at(total_B, bin_of(position_T, cap), values)
        sums.eos_only += len(position_T) == 1
        sums.truncated += len(position_T) == cap
        weight_K += (target_T - mu_hat_T) @ response.score_TK + response.entropy_T.sum()
    return sums, weight_K
