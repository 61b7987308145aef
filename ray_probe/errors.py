"""The errors that ray_probe raises on purpose, under one root.

Each takes a single string, so that it survives pickling between Ray processes, and has the exit code of the command.
"""

from collections.abc import Iterable

MAX_VALUE_CHARS = 80


def bad_value(field: str, value: object, remedy: str) -> str:
    """Return one line with the field, the value cut to 80 characters, and the remedy."""
    text = repr(value).replace("\n", "\\n")
    return f"{field}: got {cut(text)}; {remedy}"


def cut(text: str) -> str:
    """Returns at most 80 characters of a text."""
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


def some(names: Iterable[str]) -> str:
    """Join the first three names; `, ...` stands for the rest."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type, in 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


class ProbeError(Exception):
    """The root of all errors of ray_probe; `exit_code` is that of the command."""

    exit_code = 1


class InputError(ProbeError):
    """The configuration, the arguments or the files are wrong."""

    exit_code = 2


class ConfigError(InputError):
    """A configuration value, key or file cannot be used."""


class MissingError(ConfigError):
    """There is no measurement, version or series of that name."""


class StateError(ConfigError):
    """The service or the measurement is not in a state that allows this."""


class PromptsError(InputError):
    """The prompts file cannot be used; the message names file and line."""


class CheckpointError(InputError):
    """The checkpoint directory cannot be used."""


class LedgerError(InputError):
    """The ledger is damaged before its end, or belongs to another run."""


class ClusterError(ProbeError):
    """The cluster is unreachable, refuses, is too small, or starts no actor."""

    exit_code = 4


class NoClusterError(ClusterError):
    """Nothing listens at the address: the cluster is gone."""


class CancelledError(ProbeError):
    """A user stopped the measurement; its whole rounds are kept."""

    exit_code = 130


class ParityError(ProbeError):
    """The scored policy is not the policy that sampled."""

    exit_code = 5


class NonFiniteError(ProbeError):
    """Logits, entropies or features hold NaN or infinity; nothing was merged."""


class RecordError(ProbeError):
    """A shard's record does not fit the run or its own arithmetic; it was not merged."""


class OutputError(ProbeError):
    """A file of the run cannot be written."""


class ShardError(ProbeError):
    """A shard failed too often, or came twice with different bytes."""


class GradientError(ProbeError):
    """The gradient is invalid: a parameter received none, or all elements are zero."""
