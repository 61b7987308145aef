"""The sums that estimates are made of: additive over rounds, JSON for resume.

Shape suffixes: S shards, M modes, P prompts, B position bins.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.change_sums import ChangeSums
from ray_probe.core.estimator.modes import MODES
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.core.estimator.variance import within_scatter
from ray_probe.run.messages import Collected, ShardSums

COUNTS = ("eos_only", "truncated", "unfitted_shards", "shards_retried", "regenerated")
SECONDS = ("seconds", "generate_s", "teacher_force_s", "backward_s", "fit_s", "wait_s")
PAIRS = tuple((mode, against) for index, mode in enumerate(MODES) for against in MODES[:index])


@dataclass
class Totals:
    """The sums of one round or of several.

    Attributes:
        rounds: whole rounds inside.
        shards: ids of the shards inside, `round/index`.
        sizes_S3: responses, tokens and squared gradient norm of each shard.
        advantage_SM2: by shard and mode, sum of A (nats) and of A^2 (nats^2).
        within_3: scatter of entropy and length within uses of a prompt (see `within_scatter`).
        prompts: prompt id -> responses, total entropy (nats), total length (tokens).
        bins_3B: by position bin, tokens, sum of the target r and sum of the configured mu_hat (nats).
        parity: log q when sampled against log q when scored.
        counts: see `COUNTS`.
        seconds: see `SECONDS`; busy times are summed over actors.
        given_up: ids of shards that were given up.
        conflicts: ids of shards whose second record had other bytes, made on the same kind of CPU.
        change: of a comparison, the sums of the change; None for a gradient.
    """

    bins_3B: Array
    rounds: int = 0
    shards: list[str] = field(default_factory=list)
    sizes_S3: Array = field(default_factory=lambda: np.zeros((0, 3)))
    advantage_SM2: Array = field(default_factory=lambda: np.zeros((0, len(MODES), 2)))
    within_3: Array = field(default_factory=lambda: np.zeros(3))
    prompts: dict[int, Array] = field(default_factory=dict)
    parity: ParityStats = field(default_factory=ParityStats.zero)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SECONDS, 0.0))
    given_up: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)
    change: ChangeSums | None = None

    @property
    def sequences(self) -> int:
        """Number of responses."""
        return int(self.sizes_S3[:, 0].sum())

    @property
    def tokens(self) -> int:
        """Number of response tokens."""
        return int(self.sizes_S3[:, 1].sum())

    def repeated_prompts(self, responses_per_prompt: int) -> int:
        """Return the number of prompts that were used more than once."""
        return sum(int(row[0]) > responses_per_prompt for row in self.prompts.values())

    def add_shard(self, report: ShardSums) -> None:
        """Add a shard whose record and gradient are both in."""
        sums = report.sums
        self.shards.append(f"{report.round}/{report.shard}")
        self.sizes_S3 = np.vstack([self.sizes_S3, [sums.sequences, sums.tokens, report.gradient_norm_sq]])
        self.within_3 = self.within_3 + within_scatter(sums.prompt_rows_P3, sums.prompt_squares_P3)
        row_M2 = np.array([sums.advantage.get(mode, np.full(2, np.nan)) for mode in MODES])
        self.advantage_SM2 = np.concatenate([self.advantage_SM2, row_M2[None]])
        for prompt_id, row in zip(report.prompt_ids_P.tolist(), sums.prompt_rows_P3, strict=True):
            self.prompts[prompt_id] = self.prompts.get(prompt_id, np.zeros(3)) + row
        self.bins_3B = self.bins_3B + np.stack([sums.bin_weight_B, sums.bin_target_B, sums.bin_mu_hat_B])
        self.counts["eos_only"] += sums.eos_only
        self.counts["truncated"] += sums.truncated
        self.counts["unfitted_shards"] += not report.fitted
        self.seconds["backward_s"] += report.backward_s
        self._add_change(sums.change)
        if sums.change is not None:
            self.parity = self.parity + sums.change.parts.parity  # a midpoint is sampled after the fit

    def _add_change(self, change: ChangeSums | None) -> None:
        if change is not None:
            self.change = change if self.change is None else self.change + change

    def add_collected(self, report: Collected) -> None:
        """Add the parity and the times of a shard."""
        self.parity = self.parity + report.parity
        self.seconds["generate_s"] += report.generate_s
        self.seconds["teacher_force_s"] += report.teacher_force_s

    def to_json(self) -> dict[str, object]:
        """Return the totals in plain JSON types."""
        return {
            "rounds": self.rounds,
            "shards": self.shards,
            "given_up": self.given_up,
            "conflicts": self.conflicts,
            "sizes": self.sizes_S3.tolist(),
            "advantage": [[[as_number(x) for x in pair] for pair in row] for row in self.advantage_SM2.tolist()],
            "within": [as_number(x) for x in self.within_3.tolist()],
            "prompts": {str(prompt_id): row.tolist() for prompt_id, row in self.prompts.items()},
            "bins": self.bins_3B.tolist(),
            "parity": self.parity.to_json(),
            "counts": self.counts,
            "seconds": self.seconds,
            "change": None if self.change is None else self.change.to_json(),
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> "Totals":
        """Read what `to_json` returned."""
        change = raw.get("change")
        return cls(
            bins_3B=np.array(raw["bins"]),
            rounds=raw["rounds"],
            shards=raw["shards"],
            sizes_S3=np.array(raw["sizes"], np.float64).reshape(-1, 3),
            advantage_SM2=np.array(raw["advantage"], np.float64).reshape(-1, len(MODES), 2),
            within_3=np.array(raw["within"], np.float64),
            prompts={int(prompt_id): np.array(row) for prompt_id, row in raw["prompts"].items()},
            parity=ParityStats.from_json(raw["parity"]),
            counts=raw["counts"],
            seconds=raw["seconds"],
            given_up=raw["given_up"],
            conflicts=raw["conflicts"],
            change=None if change is None else ChangeSums.from_json(change),
        )


def merged(parts: Sequence[Totals]) -> Totals:
    """Return the totals of several rounds; a repeated prompt is one cluster."""
    result = Totals(bins_3B=sum((part.bins_3B for part in parts[1:]), start=parts[0].bins_3B))
    result.rounds = sum(part.rounds for part in parts)
    result.sizes_S3 = np.concatenate([part.sizes_S3 for part in parts])
    result.advantage_SM2 = np.concatenate([part.advantage_SM2 for part in parts])
    for part in parts:
        result.within_3 = result.within_3 + part.within_3
        result.shards += part.shards
        result.given_up += part.given_up
        result.conflicts += part.conflicts
        result.parity = result.parity + part.parity
        result._add_change(part.change)
        for prompt_id, row in part.prompts.items():
            result.prompts[prompt_id] = result.prompts.get(prompt_id, np.zeros(3)) + row
        for name in COUNTS:
            result.counts[name] += part.counts[name]
        for name in SECONDS:
            result.seconds[name] += part.seconds[name]
    return result


def as_number(value: Any) -> float | None:
    """Return a float for JSON; None where the value is not finite."""
    return float(value) if value is not None and np.isfinite(value) else None


def summed(reports: Iterable[ShardSums], collected: Iterable[Collected], bins: int) -> Totals:
    """Return the totals of one round; the order of the reports does not matter."""
    totals = Totals(bins_3B=np.zeros((3, bins)), rounds=1)
    for report in sorted(reports, key=lambda report: report.shard):
        totals.add_shard(report)
    for half in sorted(collected, key=lambda half: half.delivery.shard):
        totals.add_collected(half)
    return totals
