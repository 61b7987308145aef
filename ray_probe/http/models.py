"""What the endpoints take and give, beside the replies of a controller."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ray_probe.controller.replies import MeasurementInfo
from ray_probe.errors import ConfigError, bad_value
from ray_probe.run.result import Result
from ray_probe.system.json_object import JsonObject

OPEN_SECTIONS = ("model", "data", "batch", "generation", "estimator", "compare", "series")
CLOSED_KEYS = ("model.cache_dir",)
MOST_ACTORS = 4096


class Model(BaseModel):
    """The base of bodies: strict, without unknown keys."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class ErrorReply(Model):
    """An error: what happened, the value, and what to do."""

    error: str
    """One line."""


@dataclass(frozen=True)
class ResultReply(JsonObject):
    """A measurement with its result so far."""

    info: MeasurementInfo
    """The measurement."""
    result: Result | None = None
    """result.json so far; null before the first round is committed."""


@dataclass(frozen=True)
class Draining(JsonObject):
    """Whether the service refuses new measurements."""

    draining: bool
    """True: it refuses them, and finishes those that wait."""


class DrainRequest(Model):
    """Whether the service accepts new measurements."""

    on: bool = True
    """True: accept none; false: accept them again."""


class ScaleRequest(Model):
    """How many rollout actors are asked for."""

    actors: int = Field(ge=1, le=MOST_ACTORS)
    """Rollout actors from now on."""


class MeasurementRequest(Model):
    """A measurement to queue: a gradient, or with `against` a comparison.

    Paths are of the machine where the service runs.
    """

    checkpoint: str | None = None
    """Directory or hub name of the checkpoint; null: the service's own `model.path`."""
    adapter: str | None = None
    """Directory of a PEFT adapter on it, or null."""
    against: str | None = None
    """Checkpoint to compare with; null: measure the gradient."""
    against_adapter: str | None = None
    """Directory of a PEFT adapter on `against`, or null."""
    prompts: str | list[str] | None = None
    """Other prompts: a file, a data set or a list; null: the service's own."""
    snapshot: Literal["link", "copy"] | None = None
    """Pin the files until they are measured; null: the service's `model.snapshot`."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Further settings by dotted key, of model, data, batch, generation, estimator, compare and series."""

    @field_validator("*")
    @classmethod
    def _of_plain_text(cls, value: Any) -> Any:
        for text in _texts(value):
            if "\0" in text or (not text.isascii() and any("\ud800" <= one <= "\udfff" for one in text)):
                raise ValueError("text holds a character that no file name can have; leave it out")
        return value

    def by_key(self) -> dict[str, Any]:
        """Return the settings by dotted key.

        Raises:
            ConfigError: a setting belongs to the machine, or is given twice.
        """
        named = {
            "model.path": self.checkpoint, "model.adapter": self.adapter, "compare.against": self.against,
            "compare.adapter": self.against_adapter, "data.prompts": self.prompts, "model.snapshot": self.snapshot,
        }  # fmt: skip
        given = {key: value for key, value in named.items() if value is not None}
        for key, value in self.settings.items():
            if key.partition(".")[0] not in OPEN_SECTIONS or key in CLOSED_KEYS:
                remedy = f"over HTTP a measurement sets {', '.join(OPEN_SECTIONS)} alone, and no cache_dir"
                raise ConfigError(bad_value("settings", key, remedy))
            if key in given and given[key] != value:
                raise ConfigError(bad_value(f"settings.{key}", value, f"given as {given[key]!r} too; leave one out"))
            if "." not in key:
                raise ConfigError(bad_value("settings", key, "need dotted keys such as batch.rounds"))
        return given | self.settings


def _texts(value: object) -> Iterator[str]:
    """Yield every string inside a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
