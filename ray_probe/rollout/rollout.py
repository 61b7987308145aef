"""What a rollout actor does, as a plain class: collect a shard's record, then add its gradient (spec section 7).

Between the two an actor keeps the token ids and the record of each shard, its scored nuclei while these are small, and
its graph only where it may. The gradient sum goes on over the rounds between two commits.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ray_probe.core.estimator.baselines import BaselineRule, PublishedFit
from ray_probe.core.estimator.loss import Estimator, baseline_target
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.records import Record, record_of_tokens, with_prompts
from ray_probe.core.policy.token_scores import ScoredTokens
from ray_probe.errors import NonFiniteError, ShardError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.shard_sum import GradientSum, Vector
from ray_probe.model.micro_batches import ScoredMicroBatch, results_of, to_float64
from ray_probe.model.sequences import BatchedSequences, LogprobResults
from ray_probe.probe_components import ProbeComponents
from ray_probe.run.messages import Collected, Delivery, GradientReport, Receipt, ShardKey, ShardSums
from ray_probe.run.plan import Shard

MAX_CACHED_BYTES = {"cpu": 1 << 26}
"""Scored nuclei of shards waiting for a fit are cached up to this many bytes; the rest are recomputed. A GPU caches
nothing: there a pass with graph may use other kernels than a pass without, and q of one must not be combined with
hidden states of the other."""


@dataclass
class _Held:
    sequences: BatchedSequences
    prompt_ids_P: npt.NDArray[np.int64]
    record: Record
    parts: list[ScoredMicroBatch] | None = None
    cached: Sequence[ScoredTokens | None] = ()

    @property
    def positions(self) -> int:
        """Positions whose graph is held."""
        return 0 if self.parts is None else sum(part.positions for part in self.parts)

    @property
    def cached_bytes(self) -> int:
        """Memory of its scored nuclei."""
        return sum(one.bytes for one in self.cached if one is not None)


class Rollout:
    """Generates, scores and differentiates shards of one policy.

    Args:
        components: processor and loss.
        gradient: the sum of its shards' gradients.
        rule: how the baseline is formed.
        policy_id: the policy that records are marked with.
        made_on: the device that they are marked with.
    """

    def __init__(
        self, components: ProbeComponents, gradient: GradientSum, rule: BaselineRule, policy_id: str, made_on: str
    ) -> None:
        self._components = components
        self._gradient = gradient
        self._rule = rule
        self._policy_id = policy_id
        self._made_on = made_on
        self._group = ""
        self._held: dict[ShardKey, _Held] = {}
        self._added: dict[ShardKey, ShardSums] = {}
        self.most_held = sys.maxsize
        """Positions whose graphs this device has room for."""
        self._max_cached = MAX_CACHED_BYTES.get(components.processor.device.type, 0)

    @property
    def layout(self) -> ParameterLayout:
        """Names and shapes of the trainable parameters."""
        return self._gradient.layout

    @property
    def frozen(self) -> tuple[str, ...]:
        """Parameters that `model.trainable` asks for and the architecture has frozen."""
        return self._gradient.frozen

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a response."""
        return self._components.processor.eos_ids

    @property
    def why_no_head(self) -> str:
        """Why teacher forcing holds whole logits, in one line; empty where it takes the head apart."""
        return self._components.processor.forward.why_no_head

    @property
    def takes_padding(self) -> bool:
        """Whether prompts of different length are sampled at once."""
        return self._components.processor.forward.takes_padding

    @property
    def cache_gap(self) -> float:
        """Mean gap of log p between steps from the model's cache and one pass, nats; 0.0 where it is rounding."""
        return self._components.processor.forward.cache_gap

    def begin(self, group: str) -> None:
        """Start the rounds up to the next commit: nothing of those before is held or summed any more.

        Args:
            group: names those rounds; beginning the same again changes nothing.
        """
        if group != self._group:
            self._group = group
            self._held, self._added = {}, {}
            self._gradient.reset()

    def collect(self, shard: Shard, held_positions: int = 0) -> Collected:
        """Sample and score a shard; keep its tokens, return its record.

        Args:
            shard: what to sample.
            held_positions: the graphs of so many positions are kept, of all shards that wait for their fit: their
                gradient then needs no second forward pass. 0: scored without graph. The record has the same bits
                however many there is room for.
        """
        processor = self._components.processor
        started = time.monotonic()
        texts = [ref.text for ref in shard.prompts]
        sequences = processor.generate(texts, shard.responses_per_prompt, shard.response_seeds())
        generated = time.monotonic()
        self._held.pop(shard.key, None)
        parts = self._scored(sequences, min(held_positions, self.most_held))
        results = results_of(parts, shard.responses_per_prompt, with_grad=False, compute_rb=True)
        prompt_ids_P = np.array([ref.index for ref in shard.prompts], np.int64)
        record = record_of_results(results, prompt_ids_P, self._components.estimator, self._rule.cap)
        kept = replace(sequences, sample_logprobs=None)
        graphs = parts if any(part.has_graph for part in parts) else None
        cached = [part.cached for part in parts]
        self._held[shard.key] = _Held(kept, prompt_ids_P, record.without_prompts(), graphs, cached)
        packed, features = record.pack(), self._rule.features
        delivery = Delivery(self._policy_id, features, shard.round, shard.index, packed, self._made_on)
        finished = time.monotonic()
        parity = _parity(sequences, results)
        return Collected(delivery, parity, record.tokens, generated - started, finished - generated)

    def _scored(self, sequences: BatchedSequences, most_held: int) -> list[ScoredMicroBatch]:
        """The shard scored, with its graphs where so many positions may be held in all.

        Where there is no room for them every part is scored with graph all the same, so that the bits do not depend on
        the room, and lets go of it before the next.
        """
        processor = self._components.processor
        if most_held == 0:
            room = max(0, self._max_cached - sum(held.cached_bytes for held in self._held.values()))
            return list(processor.score_parts(sequences, with_grad=False, with_features=True, keep_bytes=room))
        parts = processor.score_parts(sequences, with_grad=True, with_features=True, accumulate_into_grad=True)
        room = most_held - sum(held.positions for held in self._held.values())
        if processor.positions(sequences) <= room:
            return list(parts)
        return [part.without_graph() for part in parts]

    def hold_no_graphs(self) -> None:
        """Let go of all that is held for speed, and hold nothing more: memory ran out. No record has other bits."""
        self.most_held, self._max_cached = 1, 0
        for held in self._held.values():
            held.parts, held.cached = None, ()

    def acknowledge(self, shard: Shard, receipt: Receipt) -> None:
        """Keep the record that counts: where another came first, that one is left out of the fit."""
        if receipt.kept is not None:
            self._held[shard.key].record = Record.unpack(receipt.kept).without_prompts()

    def accumulate(self, shard: Shard, fit: PublishedFit) -> ShardSums:
        """Add the shard's gradient under its round's fit to the sum, once however often it is asked for."""
        if shard.key in self._added:
            return self._added[shard.key]
        if shard.key not in self._held:
            raise ShardError(f"{shard.label}: was not collected here; collect it first")
        started = time.monotonic()
        held = self._held[shard.key]
        inside = fit.round >= shard.round
        own = held.record if inside and fit.rule.fit == "leave_one_out" else None
        baseline = fit.for_shard(own)
        self._gradient.clear()
        if held.parts is None:
            cached, held.cached = held.cached, ()
            sums = self._components.accumulate_sum_X(held.sequences, baseline, cached)
        else:
            parts, held.parts = held.parts, None  # should it fail half-way, they are gone, and tokens are scored again
            told = self._components.processor.on_progress  # a backward pass is progress, however long it takes
            sums = self._components.accumulate_parts(held.sequences, drained(parts, told), baseline)
        norm_sq = self._gradient.add_shard()
        self._added[shard.key] = result = ShardSums(
            shard.round, shard.index, fit.version, own is not None, baseline.fitted, held.prompt_ids_P, sums, norm_sq,
            time.monotonic() - started,
        )  # fmt: skip
        del self._held[shard.key]
        return result

    def gradient_report(self, group: str) -> GradientReport:
        """What the sum holds of the rounds that were begun under this name: nothing, if it is of others."""
        shards = tuple(sorted(self._added)) if group == self._group else ()
        return GradientReport(shards, self._gradient.unreached)

    def bucket(self, start: int, stop: int, *others: Vector) -> Vector:
        """A range of the flat gradient sum, with others' added; the sum itself stays until the next `begin`."""
        result = self._gradient.bucket(start, stop)
        for other in others:
            result += other
        return result


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


def drained(parts: list[ScoredMicroBatch], done: Callable[[int], None]) -> Iterator[ScoredMicroBatch]:
    """The parts, each let go of once the next is asked for; `done` is told of its tokens then."""
    parts.reverse()
    while parts:
        tokens = sum(len(row.log_q_T) for row in parts[-1].statistics)
        yield parts.pop()
        done(tokens)


def _flat(nested: list[list]) -> list:  # type: ignore[type-arg]
    return [item for group in nested for item in group]


def _parity(sequences: BatchedSequences, results: LogprobResults) -> ParityStats:
    assert sequences.sample_logprobs is not None
    return ParityStats.of(
        np.concatenate(_flat(sequences.sample_logprobs)),
        -np.concatenate(_flat(results.entropies)),
        np.concatenate(_flat(results.outside_nucleus)),
    )
