"""What rollouts, fitter and run tell each other: frozen, small, and without torch, so that any process reads them.

Shape suffixes: B position bins, P prompts.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.baselines import Mode
from ray_probe.core.estimator.parity import ParityStats

ShardKey = tuple[int, int]
"""Round and index of a shard."""


def shard_label(round_number: int, shard: int) -> str:
    """Name a shard for people, who count rounds from 1; its id in results, `0/3`, counts them from 0."""
    return f"shard {shard} of round {round_number + 1}"


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
        policy_id: the policy that it was made under.
        features: of its rows.
        round: round in the plan.
        shard: index in the round.
        packed: its bytes.
        made_on: the device that it was computed on (see `ray_probe.system.versions.made_on`).
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
        status: accepted, or a duplicate with equal bytes, or different bytes for a shard that is in already.
        kept: the record that counts, where it is not the one delivered; it is what must be left out of the fit.
    """

    status: Literal["accepted", "duplicate", "different"]
    kept: Array | None = None


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


@dataclass
class SumsX:
    """Sums over the responses of one call of `accumulate_sum_X`.

    Attributes:
        prompt_rows_P3: for each prompt: responses, total entropy (nats), total length (tokens).
        eos_only: responses that ended at once.
        truncated: responses cut at the cap.
        advantage: by mode, sum of A (nats) and of A^2 (nats^2) over tokens; absent where a mode cannot be formed.
        bin_weight_B: tokens by position bin.
        bin_target_B: sum of the target r by position bin, nats.
        bin_mu_hat_B: sum of the configured `mu_hat` by position bin, nats.
    """

    prompt_rows_P3: Array
    eos_only: int
    truncated: int
    advantage: dict[Mode, Array]
    bin_weight_B: Array
    bin_target_B: Array
    bin_mu_hat_B: Array

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


@dataclass(frozen=True)
class GradientReport:
    """What an actor's gradient sum holds, before any number of it is moved.

    Attributes:
        shards: round and index of exactly the shards inside, ascending.
        unreached: parameters (by their place in the layout) that none of those shards gave a gradient to.
    """

    shards: tuple[ShardKey, ...]
    unreached: tuple[int, ...]
