"""The columns that a baseline can read, by name. Pure Python.

No column of a token may depend on that token or on a later one of its own response, or the baseline would bias the
gradient. The other responses of the same use of a prompt are independent of it given the prompt, so a column may read
them, as long as a fit never holds some of them and judges the others (docs/specification.md, "Baselines").
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Reads = Literal["prefix", "siblings"]
Source = Literal["logits", "entropies", "fit"]


@dataclass(frozen=True)
class Column:
    """An entry of the registry.

    Attributes:
        name: as in `estimator.baseline.features`.
        meaning: with its unit.
        reads: `prefix`, or `siblings`: the other responses of the same use of a prompt.
        source: what it is computed from: the prefix's logits, the entropies of the use's responses, or the records of
            the fit itself.
    """

    name: str
    meaning: str
    reads: Reads
    source: Source


COLUMNS: dict[str, Column] = {
    column.name: column
    for column in (
        Column("H", "entropy of q, nats", "prefix", "logits"),
        Column("top1", "largest probability in q", "prefix", "logits"),
        Column(
            "margin", "difference of the two largest kept logits over temperature, nats; 0 if one is kept", "prefix",
            "logits",
        ),
        Column("head_mass", "mass of the full softmax inside the nucleus", "prefix", "logits"),
        Column("two_point_entropy", "entropy of (head_mass, 1 - head_mass), nats", "prefix", "logits"),
        Column("logit_var", "variance of the scaled logits under q, nats^2", "prefix", "logits"),
        Column(
            "pos_frac", "position over max_new_tokens (the realised length would bias the gradient)", "prefix",
            "logits",
        ),
        Column(
            "sibling_mu", "mean future entropy of the siblings that reach this position, nats; 0 if none does",
            "siblings", "entropies",
        ),
        Column("sibling_total", "mean entropy of the siblings, nats; 0 without siblings", "siblings", "entropies"),
        Column("entropy_so_far", "sum of H before this position, nats", "prefix", "entropies"),
        Column("position_mean", "mean target at this position in the records of the fit, nats", "prefix", "fit"),
    )
}  # fmt: skip
LOGIT_COLUMNS: tuple[str, ...] = tuple(name for name, column in COLUMNS.items() if column.source == "logits")


def made_from(names: Sequence[str], *sources: Source) -> tuple[str, ...]:
    """Return the named columns that are made from one of these sources, in order."""
    return tuple(name for name in names if COLUMNS[name].source in sources)


def recommended(responses_per_prompt: int) -> tuple[str, ...]:
    """Return the columns that `features: recommended` stands for.

    It is a table of measured choices (docs/estimator.md, "Which columns"). It never depends on a run's data, because
    a choice by the data would have to leave each shard out.
    """
    siblings = ("sibling_mu", "sibling_total") if responses_per_prompt > 1 else ()
    return (*LOGIT_COLUMNS, *siblings, "entropy_so_far", "position_mean")
