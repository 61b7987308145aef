"""What a rollout actor does, as a plain class: collect a shard's record, then add its gradient (spec section 7).

Between the two an actor keeps of each shard its token ids and its record, and no graph.
"""

import time
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch

from ray_probe.core.baselines import BaselineRule, PublishedFit
from ray_probe.core.loss import Estimator, baseline_target
from ray_probe.core.parity import ParityStats
from ray_probe.core.records import Record, record_of_tokens, with_prompts
from ray_probe.errors import NonFiniteError, ShardError
from ray_probe.fitter import Delivery, Receipt
from ray_probe.gradients import GradientSum, Layout, Vector
from ray_probe.plan import Shard
from ray_probe.probe_components import ProbeComponents, SumsX
from ray_probe.sequence_processor import to_float64
from ray_probe.sequences import BatchedSequences, LogprobResults


@dataclass(frozen=True, eq=False)
class Collected:
    """Report on a shard's first half: the record for the fitter, and what only the run needs.

    Attributes:
        delivery: the record, on its way to the fitter.
        parity: log q when sampled against log q when scored.
        tokens: response tokens.
        generate_s: seconds of sampling.
        teacher_force_s: seconds of scoring without gradient.
    """

    delivery: Delivery
    parity: ParityStats
    tokens: int
    generate_s: float
    teacher_force_s: float


@dataclass(frozen=True, eq=False)
class ShardSums:
    """Report on a shard whose gradient is in: everything that estimates are made of.

    Attributes:
        round: round in the plan.
        shard: index in the round.
        version: the fit whose baseline was used.
        own_left_out: the shard's own record was left out of it.
        fitted: some record was left to fit on.
        prompt_ids_P: prompt indices in the file.
        sums: counts, entropy and advantage sums.
        gradient_norm_sq: squared norm of the shard's gradient sum.
        backward_s: seconds of scoring with gradient and backward.
    """

    round: int
    shard: int
    version: int
    own_left_out: bool
    fitted: bool
    prompt_ids_P: npt.NDArray[np.int64]
    sums: SumsX
    gradient_norm_sq: float
    backward_s: float


@dataclass
class _Held:
    sequences: BatchedSequences
    prompt_ids_P: npt.NDArray[np.int64]
    record: Record


@dataclass
class RoundGradient:
    """An actor's gradient of a round: the flat sum, and exactly the shards inside it."""

    round: int
    shards: tuple[int, ...]
    vector: Vector = field(repr=False)


class Rollout:
    """Generates, scores and differentiates shards of one policy.

    Args:
        components: processor and loss.
        gradient: the gradient of the round.
        rule: how the baseline is formed.
        policy_id: the policy that records are marked with.
    """

    def __init__(self, components: ProbeComponents, gradient: GradientSum, rule: BaselineRule, policy_id: str) -> None:
        self._components = components
        self._gradient = gradient
        self._rule = rule
        self._policy_id = policy_id
        self._round = -1
        self._held: dict[int, _Held] = {}
        self._added: dict[int, ShardSums] = {}

    @property
    def layout(self) -> Layout:
        """Names and shapes of the trainable parameters."""
        return self._gradient.layout

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return self._components.processor.eos_ids

    def collect(self, shard: Shard) -> Collected:
        """Sample and score a shard without gradient; keep its tokens, return its record."""
        self._enter(shard.round)
        processor = self._components.processor
        started = time.monotonic()
        texts = [ref.text for ref in shard.prompts]
        sequences = processor.generate(texts, shard.responses_per_prompt, shard.response_seeds())
        generated = time.monotonic()
        results = processor.teacher_force_logprobs(sequences, compute_rb=True, return_baseline_features=True)
        prompt_ids_P = np.array([ref.index for ref in shard.prompts], np.int64)
        record = record_of_results(results, prompt_ids_P, self._components.estimator, self._rule.cap)
        self._held[shard.index] = _Held(replace(sequences, sample_logprobs=None), prompt_ids_P, record)
        delivery = Delivery(self._policy_id, self._rule.features, shard.round, shard.index, record.pack())
        finished = time.monotonic()
        parity = _parity(sequences, results)
        return Collected(delivery, parity, record.tokens, generated - started, finished - generated)

    def acknowledge(self, shard: Shard, receipt: Receipt) -> None:
        """Keep the record that counts: where another came first, that one is left out of the fit."""
        if receipt.kept is not None:
            self._held[shard.index].record = Record.unpack(receipt.kept)

    def holds(self, shard: Shard) -> bool:
        """Whether the shard was collected here in the round at hand."""
        return shard.round == self._round and shard.index in self._held

    def accumulate(self, shard: Shard, fit: PublishedFit) -> ShardSums:
        """Add the shard's gradient under its baseline to the round's sum, once however often it is asked for."""
        if not self.holds(shard):
            raise ShardError(f"shard {shard.id}: was not collected here; collect it first")
        if shard.index in self._added:
            return self._added[shard.index]
        started = time.monotonic()
        held = self._held[shard.index]
        inside = fit.round >= shard.round
        own = held.record if inside and fit.rule.fit == "leave_one_out" else None
        baseline = fit.for_shard(own)
        self._gradient.clear()
        sums = self._components.accumulate_sum_X(held.sequences, baseline)
        norm_sq = self._gradient.add_shard()
        self._added[shard.index] = result = ShardSums(
            shard.round, shard.index, fit.version, own is not None, baseline.fitted, held.prompt_ids_P, sums, norm_sq,
            time.monotonic() - started,
        )  # fmt: skip
        return result

    def round_gradient(self, round_number: int) -> RoundGradient:
        """The gradient summed over the shards that were accumulated here in this round."""
        self._enter(round_number)
        return RoundGradient(round_number, tuple(sorted(self._added)), self._gradient.flat())

    def _enter(self, round_number: int) -> None:
        if round_number != self._round:
            self._round = round_number
            self._held, self._added = {}, {}
            self._gradient.reset()


def record_of_results(
    results: LogprobResults, prompt_ids_P: npt.NDArray[np.int64], estimator: Estimator, cap: int
) -> Record:
    """The record of a shard's scored responses; scoring needs `compute_rb` and `return_baseline_features`.

    Args:
        results: the shard's responses, [b][g].
        prompt_ids_P: id of each prompt b.
        estimator: decides the baseline's target.
        cap: max_new_tokens.

    Raises:
        NonFiniteError: features or targets hold NaN or infinity.
    """
    assert results.rb_entropies is not None and results.baseline_feats_torch is not None
    pairs = list(zip(_flat(results.rb_entropies), _flat(results.entropies), strict=True))
    target_T = np.concatenate([baseline_target(h, s, estimator) for h, s in pairs])
    phi_TD = to_float64(torch.cat(_flat(results.baseline_feats_torch)))
    if not (np.isfinite(phi_TD).all() and np.isfinite(target_T).all()):
        raise NonFiniteError("features: NaN or infinity in a shard's statistics; it was not sent")
    position_T = np.concatenate([np.arange(len(entropy_T)) for entropy_T, _ in pairs])
    rows = [(len(group), sum(h.sum() for h in group), sum(len(h) for h in group)) for group in results.rb_entropies]
    return with_prompts(record_of_tokens(phi_TD, target_T[:, None], position_T, cap), prompt_ids_P, np.array(rows))


def _flat(nested: list[list]) -> list:  # type: ignore[type-arg]
    return [item for group in nested for item in group]


def _parity(sequences: BatchedSequences, results: LogprobResults) -> ParityStats:
    assert sequences.sample_logprobs is not None
    return ParityStats.of(
        np.concatenate(_flat(sequences.sample_logprobs)),
        -np.concatenate(_flat(results.entropies)),
        np.concatenate(_flat(results.outside_nucleus)),
    )
