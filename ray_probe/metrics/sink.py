"""The interface of a sink, and what it gets."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ray_probe.errors import ConfigError
from ray_probe.run.result import Result

UNNAMED = "probe"


@dataclass(frozen=True)
class SinkRun:
    """A measurement whose figures a sink takes.

    Attributes:
        service: name of the service or run.
        measurement: its id.
        checkpoint: directory that was measured.
        directory: of the run.
        series: name of its series, or None.
        step: of the trainer, or None.
        tags: labels by name.
    """

    service: str
    measurement: str
    checkpoint: str
    directory: Path
    series: str | None = None
    step: int | None = None
    tags: Mapping[str, str] = field(default_factory=dict)

    def placed(self, text: str) -> str:
        """Return a configured place with the name of the series in it."""
        return text.replace("{series}", self.series or UNNAMED)


class Sink(Protocol):
    """Takes the figures of measurements.

    Both methods are called in a thread of their own, `open` before each `write`. What they raise becomes one warning.
    """

    def open(self, run: SinkRun) -> None:
        """Prepare to take the figures of a measurement."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of the measurement that `open` got, by name.

        Args:
            step: of the trainer; where that is unknown, the number of the measurement.
            values: finite numbers.
        """


@contextlib.contextmanager
def installed(extra: str) -> Iterator[None]:
    """Name the extra to install where the library of a sink is missing.

    Raises:
        ConfigError: it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}; install it: pip install 'ray-probe[{extra}]'") from None


def figures(result: Result) -> dict[str, float]:
    """Return what sinks get of a result, by name, without unknown figures."""
    found = _of_change(result) if result.change is not None else _of_gradient(result)
    found |= {
        "parity_gap": result.parity.mean_gap, "responses": result.counts.sequences, "rounds": result.counts.rounds,
    }  # fmt: skip
    return {f"probe/{name}": float(value) for name, value in found.items() if value is not None}


def _of_gradient(result: Result) -> dict[str, float | None]:
    entropy, counts, gradient = result.entropy, result.counts, result.gradient
    shares = {"length": counts.tokens, "truncated": counts.truncated} if counts.sequences else {}
    return {
        "entropy_per_response": entropy.per_sequence, "entropy_per_response_se": entropy.per_sequence_se,
        "entropy_per_token": entropy.per_token, "entropy_per_token_se": entropy.per_token_se,
        "gradient_norm": gradient.norm_debiased, "snr": gradient.snr,
        **{name: amount / counts.sequences for name, amount in shares.items()},
    }  # fmt: skip


def _of_change(result: Result) -> dict[str, float | None]:
    change = result.change
    assert change is not None, "it is a comparison"
    pairs = {
        "change": change.total, "change_pathwise": change.pathwise, "change_visitation": change.visitation,
        "change_per_token": change.per_token.change, "change_length": change.length.change,
        "compared_entropy_per_response": change.entropy_b, "compared_entropy_per_token": change.per_token.b,
        "compared_length": change.length.b,
    }  # fmt: skip
    found = {name: one.value for name, one in pairs.items()} | {f"{name}_se": one.se for name, one in pairs.items()}
    return found | {
        "compared_truncated": change.truncated.b, "js": change.js,
        "effective_sample_share": change.effective_sample_share,
    }  # fmt: skip
