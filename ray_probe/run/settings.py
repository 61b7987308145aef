"""The settings of a run that reports read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class Settings:
    """The settings that reports read from a result's configuration.

    Attributes are None where the configuration lacks them. Their names are the configuration's keys; `mode`, `fit`
    and `features` are those of `estimator.baseline`, `against` and `adapter_a` those of `compare`.
    """

    path: str | None = None
    adapter: str | None = None
    trainable: str | None = None
    dtype: str | None = None
    prompts_per_round: int | None = None
    responses_per_prompt: int | None = None
    rounds: int | None = None
    max_sequences: int | None = None
    max_seconds: float | None = None
    target_error: Mapping[str, Any] | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_new_tokens: int | None = None
    rb_requires_grad: bool = True
    x_estimator_mode: str | None = None
    mode: str | None = None
    fit: str | None = None
    features: str | Sequence[str] | None = None
    against: str | None = None
    adapter_a: str | None = None

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Self:
        """Return the settings of a configuration; sections may be absent."""
        model, batch, generation, estimator = (
            config.get(name, {}) for name in ("model", "batch", "generation", "estimator")
        )
        compare = config.get("compare", {})
        other = {"against": compare.get("against"), "adapter_a": compare.get("adapter")}
        found = {**model, **batch, **generation, **estimator, **estimator.get("baseline", {}), **other}
        return cls(**{item.name: found[item.name] for item in fields(cls) if found.get(item.name) is not None})
