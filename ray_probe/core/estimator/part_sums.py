"""Hold the sums that the parts of an update are estimated from. numpy only.

They are additive over shards and rounds.

Shape suffixes: S shards, G groups of parameters.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ray_probe.core.arrays import Array
from ray_probe.core.estimator.parity import ParityStats


@dataclass(frozen=True, eq=False)
class PartSums:
    """Products of each shard's gradient with the update, by group of parameters.

    Attributes:
        groups: their names; empty where no parts are measured.
        responses_S: responses of each shard at the midpoint.
        product_SG: summed over a shard's responses, nats.
        parity: log q when sampled against log q when scored, of the midpoint.
    """

    groups: tuple[str, ...] = ()
    responses_S: Array = field(default_factory=lambda: np.zeros(0))
    product_SG: Array = field(default_factory=lambda: np.zeros((0, 0)))
    parity: ParityStats = field(default_factory=ParityStats.zero)

    def __add__(self, other: "PartSums") -> "PartSums":
        if not self.groups or not other.groups:
            return self if self.groups else other
        assert self.groups == other.groups, "parts of one architecture"
        responses_S = np.concatenate([self.responses_S, other.responses_S])
        product_SG = np.concatenate([self.product_SG, other.product_SG])
        return PartSums(self.groups, responses_S, product_SG, self.parity + other.parity)

    def to_json(self) -> dict[str, object]:
        """Return the sums in plain JSON types."""
        responses, products = self.responses_S.tolist(), self.product_SG.tolist()
        whole = {"groups": list(self.groups), "parity": self.parity.to_json()}
        return {"responses": responses, "products": products, **whole}

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Read what `to_json` returned."""
        groups = tuple(raw["groups"])
        product_SG = np.array(raw["products"], np.float64).reshape(len(raw["responses"]), len(groups))
        parity = ParityStats.from_json(raw["parity"])
        return cls(groups, np.array(raw["responses"], np.float64), product_SG, parity)
