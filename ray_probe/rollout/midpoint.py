"""Measure the parts of a change: the midpoint's gradient along the update.

The parts are of first order and by group of parameters. The midpoint (A + B) / 2 is a third policy with responses of
its own; its gradient, that of `loss_X`, is multiplied with B - A. Its weights and the update take the place of A's and
B's, so no third model is held (see `rollout.policies.PairOrMidpoint`).

The baseline is the comparison's fit of the entropy to come, evaluated on the midpoint's columns. The product is
unbiased with it: the columns of a token read its prefix, under the midpoint's q, and the other midpoint responses of
the same use of the prompt, and the fit is made of responses of A and B alone, which are independent of the midpoint's.
No response of the midpoint enters a record.

For `top_p < 1` the gradient holds the nuclei fixed, so tokens that enter or leave them count in the change and not in
its parts.

Shape suffix: G groups of parameters.
"""

from dataclasses import dataclass, replace

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import ShardBaseline
from ray_probe.core.estimator.change import MIDPOINT
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.part_sums import PartSums
from ray_probe.gradient.along_update import GradientAlongUpdate
from ray_probe.model.micro_batches import entropies_of, results_of
from ray_probe.model.sequences import BatchedSequences
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.shard_record import parity_of
from ray_probe.run.preparation.plan import Shard
from ray_probe.sequence_processor import SequenceProcessor


@dataclass(frozen=True, eq=False)
class HeldMidpoint:
    """The midpoint's responses of a shard, sampled and scored.

    Attributes:
        sequences: G responses a prompt.
        entropies: H of each of their tokens [b][g], nats.
        parity: log q when sampled against log q when scored.
    """

    sequences: BatchedSequences
    entropies: list[list[Array]]
    parity: ParityStats


class Midpoint:
    """Samples responses of the midpoint and multiplies their gradient with the update.

    Args:
        processor: of the midpoint.
        along: takes the gradient's products.
    """

    def __init__(self, processor: SequenceProcessor, along: GradientAlongUpdate) -> None:
        self.processor = processor
        self._along = along
        self._components = ProbeComponents(processor)

    def sampled(self, shard: Shard) -> BatchedSequences:
        """Return the midpoint's own responses of a shard."""
        texts = [ref.text for ref in shard.prompts]
        return self.processor.generate(texts, shard.responses_per_prompt, shard.response_seeds(MIDPOINT))

    def scored(self, sequences: BatchedSequences) -> HeldMidpoint:
        """Return what is held of sampled responses."""
        group = sequences.shape[1]
        parts = list(self.processor.score_parts(sequences, with_grad=False, with_features=False))
        parity = parity_of(sequences, results_of(parts, group, with_grad=False, compute_rb=False))
        return HeldMidpoint(replace(sequences, sample_logprobs=None), entropies_of(parts, group), parity)

    def parts(self, held: HeldMidpoint, baseline: ShardBaseline) -> PartSums:
        """Return the products of a shard's gradient with the update.

        Args:
            held: its responses.
            baseline: of the entropy to come; made without any response of the midpoint.

        Raises:
            NonFiniteError: a product is NaN or infinite.
        """

        def backward() -> None:
            self._components.accumulate_sum_X(held.sequences, baseline, (), held.entropies)

        groups, group = held.sequences.shape
        product_SG = self._along.products(backward)[None]
        return PartSums(self._along.groups, np.array([float(groups * group)]), product_SG, held.parity)
