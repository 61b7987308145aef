"""Joins the columns of logits and those of a prompt's responses.

Shape suffixes: T tokens of one response, D columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ray_probe.core.arrays import Array
from ray_probe.core.columns import COLUMNS, made_from
from ray_probe.core.estimator.entropy_columns import entropy_columns
from ray_probe.errors import ConfigError, bad_value
from ray_probe.model.sequences import LogprobResults

Entropies = Sequence[Sequence[Array]]
"""H of each token [b][g], float64 arrays [T], nats."""


@dataclass(frozen=True)
class FeatureColumns:
    """The columns of a record, in order.

    Attributes:
        names: of the columns; position_mean, which a fit appends, is left out.
        of_logits: those that a forward pass computes.
        of_entropies: those that need the entropies of all responses of a prompt's use.
    """

    names: tuple[str, ...]
    of_logits: tuple[str, ...]
    of_entropies: tuple[str, ...]

    @classmethod
    def of(cls, names: Sequence[str]) -> "FeatureColumns":
        """Return the columns with these names. Raises ConfigError for an unknown name."""
        for name in names:
            if name not in COLUMNS:
                raise ConfigError(bad_value("estimator.baseline.features", name, f"known: {', '.join(COLUMNS)}"))
        recorded = made_from(names, "logits", "entropies")
        return cls(recorded, made_from(names, "logits"), made_from(names, "entropies"))

    def from_entropies(self, entropies: Entropies, policies: int = 1) -> list[Array]:
        """Return the columns `of_entropies` [T, D] by place b * G + g, nats.

        Args:
            entropies: of all responses; of two policies their mean.
            policies: 2 for responses that are half of one policy and half of another, paired in order.
        """
        return [table_TD for group in entropies for table_TD in entropy_columns(self.of_entropies, group, policies)]

    def join(self, logit_TD: Tensor | None, entropy_TD: Array) -> Tensor:
        """Return all columns of a response in order [T, D].

        They are float64 where any is made from entropies.

        Args:
            logit_TD: the columns `of_logits`; None without any.
            entropy_TD: the columns `of_entropies`, nats.
        """
        if logit_TD is None:
            return torch.from_numpy(entropy_TD)
        if not self.of_entropies:
            return logit_TD
        made = (*self.of_logits, *self.of_entropies)
        both_TD = torch.cat([logit_TD.double(), torch.from_numpy(entropy_TD).to(logit_TD.device)], dim=1)
        return both_TD[:, [made.index(name) for name in self.names]]

    def complete(self, results: LogprobResults, columns: Sequence[Array]) -> LogprobResults:
        """Return results whose features hold all columns.

        Args:
            results: with the columns `of_logits`, if there are any.
            columns: of `from_entropies`, for the same responses in order.
        """
        groups, group = results.shape
        logits, rest = results.baseline_feats_torch, iter(columns)
        joined = [
            [self.join(None if logits is None else logits[b][g], next(rest)) for g in range(group)]
            for b in range(groups)
        ]
        return replace(results, baseline_feats_torch=joined)
