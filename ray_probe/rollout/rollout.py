"""The rollout as a plain class: collects a shard's record, then adds its gradient.

In between it holds the shard's token ids, entropies and record, cached nuclei up to a limit, and graphs where memory
allows. The gradient sum spans the rounds of a commit group.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import BaselineRule
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.records import Record
from ray_probe.core.policy.token_scores import ScoredTokens
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.shard_sum import GradientSum, Vector
from ray_probe.model.micro_batches import ScoredMicroBatch, entropies_of, results_of
from ray_probe.model.sequences import BatchedSequences
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.response_store import SharedResponses
from ray_probe.rollout.shard_record import parity_of, record_of_results
from ray_probe.rollout.shards import GroupShards
from ray_probe.run.messages import Collected, Delivery, GradientReport, Receipt, ShardSums
from ray_probe.run.preparation.plan import Shard

MAX_CACHED_BYTES = {"cpu": 1 << 26}
"""Bytes of scored nuclei, by device, that shards waiting for a fit may cache; the rest are recomputed."""
# A GPU caches none: a pass with graph may use other kernels than a pass without, and q of one must not be combined
# with hidden states of the other.


@dataclass
class _Held:
    sequences: BatchedSequences
    prompt_ids_P: npt.NDArray[np.int64]
    record: Record
    entropies: list[list[Array]]
    parts: list[ScoredMicroBatch] | None = None
    cached: Sequence[ScoredTokens | None] = ()

    @property
    def positions(self) -> int:
        """Positions whose graph is held."""
        return 0 if self.parts is None else sum(part.positions for part in self.parts)

    @property
    def cached_bytes(self) -> int:
        """Bytes of the cached nuclei."""
        return sum(one.bytes for one in self.cached if one is not None)


class Rollout:
    """Generates, scores and differentiates shards of one policy.

    Args:
        components: processor and loss.
        gradient: receives the shards' gradients.
        rule: how the baseline is formed.
        policy_id: identifies the policy in records.
        made_on: identifies the device in records.
        shared: samples responses that comparisons of the checkpoint have too; None: it has its own.
    """

    def __init__(
        self, components: ProbeComponents, gradient: GradientSum, rule: BaselineRule, policy_id: str, made_on: str,
        shared: SharedResponses | None = None,
    ) -> None:  # fmt: skip
        self._components = components
        self._shared = shared
        self._gradient = gradient
        self._rule = rule
        self._policy_id = policy_id
        self._made_on = made_on
        self._shards = GroupShards[_Held]()
        self.most_held = sys.maxsize
        """Positions whose graphs fit on this device."""
        self.moved_share: float | None = None
        """Of a comparison alone."""
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
        """Why teacher forcing holds whole logits, in one line; empty where it does not."""
        return self._components.processor.forward.why_no_head

    @property
    def takes_padding(self) -> bool:
        """Whether prompts of different length are sampled in one batch."""
        return self._components.processor.forward.takes_padding

    @property
    def cache_gap(self) -> float:
        """Mean gap of log p between cached steps and one pass, nats; 0.0: rounding."""
        return self._components.processor.forward.cache_gap

    def begin(self, group: str) -> None:
        """Start a commit group, and drop all that is held or summed of the earlier one.

        Args:
            group: names the group; a retry changes nothing.
        """
        if self._shards.begin(group):
            self._gradient.reset()

    def collect(self, shard: Shard, held_positions: int = 0) -> Collected:
        """Sample and score a shard; returns its record, and holds its tokens.

        Args:
            shard: the shard.
            held_positions: positions, of all waiting shards, whose graphs may be held, so that their gradients need
                no second forward pass. 0: scored without graph. The record's bits do not depend on a positive number.
        """
        processor = self._components.processor
        started = time.monotonic()
        sequences = self._sampled(shard)
        generated = time.monotonic()
        self._shards.held.pop(shard.key, None)
        parts = self._scored(sequences, min(held_positions, self.most_held))
        entropies = entropies_of(parts, shard.responses_per_prompt)
        results = results_of(parts, shard.responses_per_prompt, with_grad=False, compute_rb=True)
        results = processor.columns.complete(results, processor.columns.from_entropies(entropies))
        prompt_ids_P = np.array([ref.index for ref in shard.prompts], np.int64)
        record = record_of_results(results, prompt_ids_P, self._components.estimator, self._rule.cap)
        kept = replace(sequences, sample_logprobs=None)
        graphs = parts if any(part.has_graph for part in parts) else None
        cached = [part.cached for part in parts]
        self._shards.held[shard.key] = _Held(kept, prompt_ids_P, record.without_prompts(), entropies, graphs, cached)
        packed, features = record.pack(), self._rule.features
        delivery = Delivery(self._policy_id, features, shard.round, shard.index, packed, self._made_on)
        finished = time.monotonic()
        parity = parity_of(sequences, results)
        return Collected(delivery, parity, record.tokens, generated - started, finished - generated)

    def _sampled(self, shard: Shard) -> BatchedSequences:
        """Return the responses of a shard."""
        processor = self._components.processor
        if self._shared is not None:
            return self._shared.sampled(processor, shard)
        texts = [ref.text for ref in shard.prompts]
        return processor.generate(texts, shard.responses_per_prompt, shard.response_seeds())

    def _scored(self, sequences: BatchedSequences, most_held: int) -> list[ScoredMicroBatch]:
        """Returns the scored shard, with its graphs if `most_held` leaves room."""
        processor = self._components.processor
        if most_held == 0:
            room = max(0, self._max_cached - sum(held.cached_bytes for held in self._shards.held.values()))
            return list(processor.score_parts(sequences, with_grad=False, with_features=True, keep_bytes=room))
        parts = processor.score_parts(sequences, with_grad=True, with_features=True, accumulate_into_grad=True)
        room = most_held - sum(held.positions for held in self._shards.held.values())
        if processor.positions(sequences) <= room:
            return list(parts)
        # Scored with graph all the same: the bits must not depend on the room.
        return [part.without_graph() for part in parts]

    def hold_no_graphs(self) -> None:
        """Drop held graphs and caches for good, after memory ran out.

        Records keep their bits.
        """
        self.most_held, self._max_cached = 1, 0
        for held in self._shards.held.values():
            held.parts, held.cached = None, ()

    def acknowledge(self, shard: Shard, receipt: Receipt) -> None:
        """Hold the record that the fitter counts: it is left out of this shard's fit."""
        self._shards.acknowledge(shard, receipt)

    def accumulate(self, shard: Shard, fit: PublishedFit) -> ShardSums:
        """Add the shard's gradient under its round's fit to the sum; a retry adds nothing."""
        if shard.key in self._shards.added:
            return self._shards.added[shard.key]
        held = self._shards.waiting(shard)
        started = time.monotonic()
        inside = fit.round >= shard.round
        own = held.record if inside and fit.rule.fit == "leave_one_out" else None
        baseline = fit.for_shard(own)
        self._gradient.clear()
        if held.parts is None:
            cached, held.cached = held.cached, ()
            sums = self._components.accumulate_sum_X(held.sequences, baseline, cached, held.entropies)
        else:
            parts, held.parts = held.parts, None  # a retry after an error scores the tokens again
            done = self._components.processor.on_progress
            sums = self._components.accumulate_parts(held.sequences, drained(parts, done), baseline, held.entropies)
        norm_sq = self._gradient.add_shard()
        return self._shards.finish(
            shard,
            ShardSums(
                shard.round, shard.index, fit.version, own is not None, baseline.fitted, held.prompt_ids_P, sums,
                norm_sq, time.monotonic() - started,
            ),
        )  # fmt: skip

    def gradient_report(self, group: str) -> GradientReport:
        """Returns which shards of this group the sum holds; no shard of another group."""
        return GradientReport(self._shards.of(group), self._gradient.unreached)

    def bucket(self, start: int, stop: int, *others: Vector) -> Vector:
        """Returns a range of the flat gradient sum plus `others`; the sum is unchanged."""
        result = self._gradient.bucket(start, stop)
        for other in others:
            result += other
        return result


def drained(parts: list[ScoredMicroBatch], done: Callable[[int], None]) -> Iterator[ScoredMicroBatch]:
    """Yields the parts, drops each before the next, and calls `done` with its tokens."""
    parts.reverse()
    while parts:
        tokens = sum(len(row.log_q_T) for row in parts[-1].statistics)
        yield parts.pop()
        done(tokens)
