"""The rollout of a comparison: two policies sample, and both score all responses.

Each samples half of a prompt's responses.

It takes no gradient of either, so it needs the memory of inference. Between the halves of its work it holds a few
numbers a token (see `HeldComparison`). For parts of the update there is a third policy, see `rollout.midpoint`.

Shape suffixes: S the two policies (A, B), T tokens of one response, D columns, K targets.
"""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import BaselineRule, ShardBaseline, mu_hat_by_mode
from ray_probe.core.estimator.change import ENTROPY, SIDES, ComparedResponse
from ray_probe.core.estimator.change_sums import ChangeSums
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.records import Record
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.gradient.shard_sum import Vector
from ray_probe.model.micro_batches import results_of, to_float64
from ray_probe.model.sequences import BatchedSequences, LogprobResults, pack_sequences
from ray_probe.rollout.midpoint import Midpoint
from ray_probe.rollout.policies import Policies
from ray_probe.rollout.response_store import ResponseStore
from ray_probe.rollout.shard_record import record_of_responses
from ray_probe.rollout.shards import GroupShards
from ray_probe.run.messages import Collected, Delivery, GradientReport, Receipt, ShardSums, SumsX
from ray_probe.run.preparation.plan import Shard
from ray_probe.sequence_processor import SequenceProcessor


@dataclass(frozen=True, eq=False)
class ComparedResponses:
    """Responses scored under both policies.

    Attributes:
        responses: [b][g]; the first half of each group was sampled from A, the second from B.
        columns: of the baseline, [b][g], float64 arrays [T, D].
    """

    responses: list[list[ComparedResponse]]
    columns: list[list[Array]]

    def record(self, prompt_ids_P: npt.NDArray[np.int64], cap: int) -> Record:
        """Return their record: two targets, and entropies under each own sampler."""
        flat = [one for group in self.responses for one in group]
        entropies = [[one.entropy_ST[one.side] for one in group] for group in self.responses]
        phi_TD = np.concatenate([phi for group in self.columns for phi in group])
        return record_of_responses(phi_TD, [one.target_TK for one in flat], entropies, prompt_ids_P, cap)


def compared(processors: Policies, sequences: BatchedSequences) -> ComparedResponses:
    """Score responses under both policies.

    A logit column is the mean of both policies' values, each under its own q. Columns made from entropies are of the
    mean entropy, and the siblings of a response are the prompt's other pairs: both policies then see the same ones.

    Args:
        processors: of A and of B.
        sequences: the responses; the first half of each prompt's were sampled from A, the second from B.
    """
    columns = processors[1].columns
    scores = [_scores(processors[side], sequences) for side in (1, 0)][::-1]  # B was sampled last, A comes next
    groups, group = sequences.shape
    responses = [[_response(scores, b, g, int(g >= group // 2)) for g in range(group)] for b in range(groups)]
    means = [[one.mean_entropy_T for one in row] for row in responses]
    made = iter(columns.from_entropies(means, policies=len(SIDES)))
    joined = [
        [to_float64(columns.join(_mean_features(scores, b, g), next(made))) for g in range(group)]
        for b in range(groups)
    ]
    return ComparedResponses(responses, joined)


def _scores(processor: SequenceProcessor, sequences: BatchedSequences) -> LogprobResults:
    parts = list(processor.score_parts(sequences, with_grad=False, with_features=True))
    return results_of(parts, sequences.shape[1], with_grad=False, compute_rb=True)


def _response(scores: Sequence[LogprobResults], b: int, g: int, side: int) -> ComparedResponse:
    entropies = [one.rb_entropies[b][g] for one in scores if one.rb_entropies is not None]
    return ComparedResponse.of(
        side,
        np.stack([-one.entropies[b][g] for one in scores]),
        np.stack(entropies),
        np.stack([one.outside_nucleus[b][g] for one in scores]),
    )


def _mean_features(scores: Sequence[LogprobResults], b: int, g: int) -> torch.Tensor | None:
    found = [one.baseline_feats_torch[b][g].cpu() for one in scores if one.baseline_feats_torch is not None]
    return (found[0].double() + found[1].double()) / 2.0 if found else None


@dataclass
class HeldComparison:
    """A shard that waits for its fit.

    Attributes:
        record: that the fitter counts.
        compared: its responses.
        prompt_ids_P: index of each prompt in the file.
        ended: whether each response ended at an EOS token [b][g].
        parity: of each policy.
    """

    record: Record
    compared: ComparedResponses
    prompt_ids_P: npt.NDArray[np.int64]
    ended: list[list[bool]]
    parity: tuple[ParityStats, ParityStats]


class Comparison:
    """Samples shards from two policies, scores them under both, sums the change.

    It has the methods of `ray_probe.rollout.rollout.Rollout`, with a gradient of no number.

    Args:
        processors: of A and of B, over the same tokens.
        rule: how the baseline is formed, with two targets.
        policy_id: identifies both policies in records.
        made_on: identifies the device in records.
        moved_share: share of the parameters that differ; None: not compared.
        side: of A in the seeds of responses.
        midpoint: returns what measures the parts of the update, and may put it in the place of `processors`, which
            make their own place again; None: no parts are measured.
        store: has A's responses of the step before in a chain, and keeps B's; None: no chain.

    Attributes:
        eos_ids: ids that end a response.
        why_no_head: why teacher forcing holds whole logits, in one line; empty where it does not.
        takes_padding: both models sample prompts of different length in one batch.
        cache_gap: the larger mean gap of log p between cached steps and one pass, nats; 0.0: rounding.
    """

    layout = ParameterLayout((), ())
    frozen: tuple[str, ...] = ()

    def __init__(
        self, processors: Policies, rule: BaselineRule, policy_id: str, made_on: str,
        moved_share: float | None = None, side: int = 0, midpoint: Callable[[], Midpoint] | None = None,
        store: ResponseStore | None = None,
    ) -> None:  # fmt: skip
        self.processors = processors
        self._store = store
        self._midpoint = midpoint
        self.moved_share = moved_share
        self.most_held = sys.maxsize
        first = processors[0]
        self.eos_ids, self._rows, self._encode = first.eos_ids, first.rows, first.encode
        found = [first.forward, processors[1].forward]  # a midpoint has their architecture
        self.why_no_head = next(filter(None, (one.why_no_head for one in found)), "")
        self.takes_padding = all(one.takes_padding for one in found)
        self.cache_gap = max(one.cache_gap for one in found)
        self._rule = rule
        self._policy_id = policy_id
        self._made_on = made_on
        self._first_side = side
        self._shards = GroupShards[HeldComparison]()

    def begin(self, group: str) -> None:
        """Start a commit group, and drop all that is held or summed of the earlier one."""
        self._shards.begin(group)

    def collect(self, shard: Shard, held_positions: int = 0) -> Collected:
        """Sample and score a shard; returns its record, and holds its scores.

        Args:
            shard: the shard.
            held_positions: ignored: a comparison has no graphs.
        """
        started = time.monotonic()
        sequences = self._sampled(shard)
        generated = time.monotonic()
        found = compared(self.processors, sequences)
        assert sequences.sample_logprobs is not None
        parity = _parity(found, sequences.sample_logprobs)
        prompt_ids_P = np.array([ref.index for ref in shard.prompts], np.int64)
        record = found.record(prompt_ids_P, self._rule.cap)
        groups, group = sequences.shape
        ended = [
            [int(sequences.tokens(b, g)[1][-1]) in self.eos_ids for g in range(group)] for b in range(groups)
        ]
        kept = record.without_prompts()
        self._shards.held[shard.key] = HeldComparison(kept, found, prompt_ids_P, ended, parity)
        delivery = Delivery(
            self._policy_id, self._rule.features, shard.round, shard.index, record.pack(), self._made_on
        )
        finished = time.monotonic()
        return Collected(delivery, parity[0] + parity[1], record.tokens, generated - started, finished - generated)

    def _sampled(self, shard: Shard) -> BatchedSequences:
        """Returns the responses of both policies; A's come first in each group."""
        texts, half = [ref.text for ref in shard.prompts], shard.responses_per_prompt // len(SIDES)
        prompts = [self._encode(text) for text in texts]

        seeds = [shard.response_seeds(side ^ self._first_side) for side in range(len(SIDES))]

        def generated(side: int) -> BatchedSequences:
            return self.processors[side].generate(texts, half, seeds[side])

        kept = None if self._store is None else self._store.load(shard, prompts, seeds[0])
        sides = [generated(0) if kept is None else kept, generated(1)]
        if self._store is not None:
            self._store.keep(shard, sides[1], seeds[1])
        tokens = [[one.tokens(b, g)[1].tolist() for one in sides for g in range(half)] for b in range(len(texts))]
        log_q = [[row for one in sides for row in (one.sample_logprobs or [])[b]] for b in range(len(texts))]
        return pack_sequences(prompts, tokens, log_q)

    def hold_no_graphs(self) -> None:
        """Do nothing: no graph is held."""

    def acknowledge(self, shard: Shard, receipt: Receipt) -> None:
        """Hold the record that the fitter counts: it is left out of this shard's fit."""
        self._shards.acknowledge(shard, receipt)

    def accumulate(self, shard: Shard, fit: PublishedFit) -> ShardSums:
        """Return the shard's sums under its round's fit; a retry returns the same."""
        if shard.key in self._shards.added:
            return self._shards.added[shard.key]
        held = self._shards.waiting(shard)
        started = time.monotonic()
        own = held.record if fit.round >= shard.round and fit.rule.fit == "leave_one_out" else None
        baselines = [fit.for_shard(own, target) for target in range(len(SIDES))]
        sums = self._sums(held, baselines)
        if self._midpoint is not None and sums.change is not None:
            # Not before: the midpoint takes the memory of the policies, which all shards of a round are scored under.
            midpoint = self._midpoint()
            sums.change.parts = midpoint.parts(midpoint.scored(midpoint.sampled(shard)), baselines[ENTROPY])
        return self._shards.finish(
            shard,
            ShardSums(
                shard.round, shard.index, fit.version, own is not None, baselines[0].fitted, held.prompt_ids_P, sums,
                0.0, time.monotonic() - started,
            ),
        )  # fmt: skip

    def _sums(self, held: HeldComparison, baselines: Sequence[ShardBaseline]) -> SumsX:
        cap = self._rule.cap
        sums = SumsX.empty(len(held.prompt_ids_P), cap)
        change = replace(ChangeSums.zero(cap, self._rows), parity=held.parity)
        for b, (prompt, group) in enumerate(zip(held.prompt_ids_P.tolist(), held.compared.responses, strict=True)):
            mu_hats = []
            for response, phi_TD, ended in zip(group, held.compared.columns[b], held.ended[b], strict=True):
                position_T, target_T = np.arange(response.length), response.target_TK[:, ENTROPY]
                mu_hat_TK = np.stack([one.mu_hat(one.mode, position_T, phi_TD) for one in baselines], axis=1)
                by_mode = mu_hat_by_mode(baselines[ENTROPY], position_T, phi_TD)
                residuals = {mode: target_T - mu_T for mode, mu_T in by_mode.items()}
                entropy = response.entropy_ST[response.side].sum()
                sums.add_response(b, entropy, ended, target_T, mu_hat_TK[:, ENTROPY], residuals, cap)
                change.truncated_2[response.side] += not ended
                mu_hats.append(mu_hat_TK)
            change.add_use(prompt, group, mu_hats, cap)
        sums.change = change
        return sums

    def gradient_report(self, group: str) -> GradientReport:
        """Returns which shards of this group are summed; no shard of another group."""
        return GradientReport(self._shards.of(group), ())

    def bucket(self, start: int, stop: int, *others: Vector) -> Vector:
        """Returns a range of the flat gradient, which has no number."""
        assert not others, "a gradient of no number has no bucket"
        return np.zeros(stop - start)


def _parity(found: ComparedResponses, sampled: list[list[Array]]) -> tuple[ParityStats, ParityStats]:
    """Return the parity of each policy on its own responses."""
    parts = [ParityStats.zero(), ParityStats.zero()]
    for group, log_q in zip(found.responses, sampled, strict=True):
        for one, sampled_T in zip(group, log_q, strict=True):
            parts[one.side] += ParityStats.of(sampled_T, one.log_q_ST[one.side], one.outside_ST[one.side])
    return parts[0], parts[1]
