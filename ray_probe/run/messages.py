"""Messages between rollout actors, fitter and run, without torch.

Shape suffixes: B position bins, P prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.change_sums import ChangeSums
from ray_probe.core.estimator.modes import MODES, Mode
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.records import PROMPT_COLUMNS, bin_of, position_bins
from ray_probe.gradient.layout import ParameterLayout

ShardKey = tuple[int, int]
"""Round and index of a shard."""


def shard_label(round_number: int, shard: int) -> str:
    """Return the name of a shard for people, with rounds from 1.

    Its id in results, `0/3`, counts rounds from 0.
    """
    return f"shard {shard} of round {round_number + 1}"


@dataclass(frozen=True)
class ActorFacts:
    """What a rollout actor reports of itself once it has loaded a checkpoint.

    Attributes:
        layout: names and shapes of the trainable parameters.
        device: `cpu`, or the name of the GPU.
        threads: of torch.
        spare_bytes: memory that held graphs may take.
        frozen: parameters that `model.trainable` names and the architecture has frozen.
        why_no_head: why teacher forcing holds the logits of a micro-batch; empty where it does not.
        takes_padding: prompts of different length can be sampled in one batch.
        cache_gap: mean gap of log p between cached steps and one pass, nats; 0.0 where it is rounding.
        pid: of the actor's process.
        node: address of its node.
        moved_share: of a comparison, share of the parameters that differ between the checkpoints; None: not compared.
        in_turns: of a comparison, both models do not fit on the device: it holds one at a time.
    """

    layout: ParameterLayout
    device: str
    threads: int
    spare_bytes: int
    frozen: tuple[str, ...] = ()
    why_no_head: str = ""
    takes_padding: bool = True
    cache_gap: float = 0.0
    pid: int = 0
    node: str = ""
    moved_share: float | None = None
    in_turns: bool = False


@dataclass(frozen=True)
class FitterSession:
    """A fitter's open measurement, as deliveries name it.

    Attributes:
        id: unique token.
    """

    id: str


@dataclass(frozen=True, eq=False)
class Delivery:
    """A shard's record on its way to the fitter.

    Attributes:
        policy_id: of the policy that sampled.
        features: of its rows.
        round: round in the plan.
        shard: index in the round.
        packed: its bytes.
        made_on: the device that computed it (see `ray_probe.system.versions.made_on`).
    """

    policy_id: str
    features: tuple[str, ...]
    round: int
    shard: int
    packed: Array
    made_on: str


@dataclass(frozen=True, eq=False)
class Receipt:
    """The fitter's answer to a delivery.

    Attributes:
        status: accepted; a duplicate with equal bytes; or different bytes for a shard that was accepted before.
        kept: the record that counts, where it is not the delivered one; a left-out fit leaves it out.
    """

    status: Literal["accepted", "duplicate", "different"]
    kept: Array | None = None


@dataclass(frozen=True)
class InSample:
    """The current fit on its own records, which flatters it.

    Attributes:
        version: of the fit.
        tokens: response tokens behind it.
        sequences: responses behind it.
        mean_square: by baseline, mean squared residual of the target, nats^2 per token; None without a token.
    """

    version: int
    tokens: int
    sequences: int
    mean_square: dict[Mode, float | None]


@dataclass(frozen=True, eq=False)
class Collected:
    """The report on a shard's first half: its record, parity and times.

    Attributes:
        delivery: the record.
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


@dataclass
class SumsX:
    """Sums over the responses of one call of `accumulate_sum_X`.

    Attributes:
        prompt_rows_P3: for each prompt: responses, total entropy (nats), total length (tokens).
        prompt_squares_P3: for each prompt, sums over responses of H^2, H T and T^2 of entropy H and length T.
        eos_only: responses that ended at their first token.
        truncated: responses cut at the cap.
        advantage: by mode, sum of A (nats) and of A^2 (nats^2) over tokens; absent where a mode cannot be formed.
        bin_weight_B: tokens by position bin.
        bin_target_B: sum of the target r by position bin, nats.
        bin_mu_hat_B: sum of the configured `mu_hat` by position bin, nats.
        change: of a comparison, the sums of the change; None for a gradient.
    """

    prompt_rows_P3: Array
    prompt_squares_P3: Array
    eos_only: int
    truncated: int
    advantage: dict[Mode, Array]
    bin_weight_B: Array
    bin_target_B: Array
    bin_mu_hat_B: Array
    change: ChangeSums | None = None

    @classmethod
    def empty(cls, prompts: int, cap: int) -> Self:
        """Return the sums of no response.

        Args:
            prompts: number of prompts P.
            cap: max_new_tokens.
        """
        bins = position_bins(cap)
        rows, squares = (np.zeros((prompts, len(PROMPT_COLUMNS))) for _ in range(2))
        advantage: dict[Mode, Array] = {mode: np.zeros(2) for mode in MODES}
        return cls(rows, squares, 0, 0, advantage, np.zeros(bins), np.zeros(bins), np.zeros(bins))

    def add_response(
        self, prompt: int, entropy: float, ended: bool, target_T: Array, mu_hat_T: Array,
        advantages: Mapping[Mode, Array], cap: int,
    ) -> None:  # fmt: skip
        """Add a response.

        Args:
            prompt: place of its prompt.
            entropy: its total entropy, nats.
            ended: it ended at an EOS token.
            target_T: the target r at each token, nats.
            mu_hat_T: the configured `mu_hat` at each token, nats.
            advantages: A at each token by mode, nats; a mode that is absent once is absent from the sums.
            cap: max_new_tokens.
        """
        length = len(target_T)
        self.prompt_rows_P3[prompt] += (1.0, entropy, length)
        self.prompt_squares_P3[prompt] += (entropy**2, entropy * length, length**2)
        self.eos_only += ended and length == 1
        self.truncated += not ended
        for mode in set(self.advantage) - set(advantages):
            del self.advantage[mode]
        for mode, total_2 in self.advantage.items():
            total_2 += (advantages[mode].sum(), (advantages[mode] ** 2).sum())
        bins_T = bin_of(np.arange(length), cap)
        by_bin = ((self.bin_weight_B, 1.0), (self.bin_target_B, target_T), (self.bin_mu_hat_B, mu_hat_T))
        for total_B, values in by_bin:
            np.add.at(total_B, bins_T, values)

    @property
    def sequences(self) -> int:
        """Responses counted."""
        return int(self.prompt_rows_P3[:, 0].sum())

    @property
    def tokens(self) -> int:
        """Response tokens counted."""
        return int(self.prompt_rows_P3[:, 2].sum())


@dataclass(frozen=True, eq=False)
class ShardSums:
    """The report on a shard's second half: the sums that estimates are made of.

    Attributes:
        round: round in the plan.
        shard: index in the round.
        version: the fit whose baseline was used.
        own_left_out: that fit left the shard's own record out.
        fitted: a record was left to fit on.
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


@dataclass(frozen=True)
class GradientReport:
    """The content of an actor's gradient sum.

    Attributes:
        shards: round and index of exactly the shards inside, ascending.
        unreached: places in the layout of parameters that received no gradient from those shards.
    """

    shards: tuple[ShardKey, ...]
    unreached: tuple[int, ...]
