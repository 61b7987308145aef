"""Field types of the config, each with the remedy that its error names."""

import difflib
import re
import shlex
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import pydantic_core
from pydantic import AfterValidator, BeforeValidator, Field, JsonValue, ValidationError, WrapValidator

from ray_probe.core.columns import COLUMNS
from ray_probe.errors import MAX_VALUE_CHARS


def refusal(remedy: str, **of_section: Any) -> pydantic_core.PydanticCustomError:
    """Returns an error with this text; a section's check adds `field` and `value`."""
    return pydantic_core.PydanticCustomError("refused", "{remedy}", {"remedy": remedy, **of_section})


def _need(remedy: str) -> WrapValidator:
    """Turns errors in the value, or deep inside it, into one with this remedy."""

    def check(value: Any, handler: Callable[[Any], Any]) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise refusal(f"need {remedy}") from None

    return WrapValidator(check)


def closest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known word nearest to a misspelt one, or None."""
    by_lower = {word.lower(): word for word in known}
    close = difflib.get_close_matches(name[:MAX_VALUE_CHARS].lower(), list(by_lower), n=1)
    return by_lower[close[0]] if close else None


def check_trainable(value: str) -> str:
    """Accepts `all`, `adapter`, or a regular expression that compiles."""
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise refusal(f"need all, adapter, or a regular expression over parameter names ({error})") from None
    return value


def check_features(value: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Accepts the name of a set, or known feature names, each at most once."""
    if isinstance(value, str):
        return value
    for index, name in enumerate(value):
        if name not in COLUMNS:
            close = closest(name, COLUMNS)
            hint = f" (did you mean {close!r}?)" if close else ""
            raise refusal(f"unknown feature {name[:MAX_VALUE_CHARS]!r}{hint}, known: {', '.join(COLUMNS)}")
        if name in value[:index]:
            raise refusal(f"the feature {name!r} is repeated, name each at most once")
    return value


def _distinct(value: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(value)) < len(value):
        raise ValueError("repeated")
    return value


def _address(value: str | None) -> str | None:
    pattern = r"(?:[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?|\[[0-9A-Fa-f]*:[0-9A-Fa-f:.]*\]):([0-9]{1,5})"
    match = re.fullmatch(pattern, value or "")
    if value not in (None, "auto") and not (match and 1 <= int(match[1]) <= 65535):
        raise ValueError("not an address")
    return value


def _command(value: str | None) -> str | None:
    if value is not None and not shlex.split(value):
        raise ValueError("no program")
    return value


def _web_address(value: str | None) -> str | None:
    parts = None if value is None else urllib.parse.urlsplit(value)
    if parts is not None and (parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0):
        raise ValueError("not a web address")
    return value


def check_resources(value: dict[str, float]) -> dict[str, float]:
    """Accepts custom resources only: CPU and GPU have keys of their own."""
    for name in ("CPU", "GPU"):
        if name in value:  # Ray itself refuses it, but only when the first actor starts
            raise refusal(f"{name} is not a custom resource, set cluster.{name.lower()}s_per_actor")
    return value


def check_runtime_env(value: dict[str, JsonValue]) -> dict[str, JsonValue]:
    """Accepts environments without our own variables, which are for tests."""
    variables = value.get("env_vars")
    ours = [name for name in variables if name.startswith("RAY_PROBE_")] if isinstance(variables, dict) else []
    if ours:
        raise refusal(f"leave out env_vars.{ours[0][:MAX_VALUE_CHARS]}: names that begin with RAY_PROBE_ are reserved")
    return value


_TUPLE = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
_NOT_BLANK = Field(pattern=r"^[^\x00]*[^\x00\s][^\x00]*$")
_NAME = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")

Text = Annotated[str, _NOT_BLANK, _need("a string that is not blank (a number needs quotes)")]
OptionalText = Annotated[Text | None, _need("null or a string that is not blank (a number needs quotes)")]
Prompts = Annotated[
    Text | Annotated[tuple[str, ...], Field(min_length=1)],
    _TUPLE,
    _need("the path of a JSONL or parquet file, a data set, or a list of at least one prompt string"),
]
RunName = Annotated[
    Annotated[str, _NAME] | None, _need("null or 1 to 63 of a-z, 0-9, _ and -, with a letter or digit first")
]
Address = Annotated[
    str | None,
    AfterValidator(_address),
    _need("null (start Ray here), auto, or host:port with a port from 1 to 65535"),
]
Command = Annotated[
    str | None, AfterValidator(_command), _need("null or a program with its arguments, with quotes that are closed")
]
WebAddress = Annotated[str | None, AfterValidator(_web_address), _need("null or an address http://... or https://...")]
Count = Annotated[int, Field(ge=1, lt=2**31), _need("an integer >= 1 and < 2**31")]
OptionalCount = Annotated[Count | None, _need("null or an integer >= 1 and < 2**31")]
OptionalStep = Annotated[
    Annotated[int, Field(ge=0, lt=2**63)] | None, _need("null or an integer >= 0 and < 2**63")
]
Seed = Annotated[int, Field(ge=0, lt=2**63), _need("an integer >= 0 and < 2**63")]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[
    Annotated[tuple[TokenId, ...], _TUPLE, AfterValidator(_distinct)] | None,
    _need("null or a list of distinct token ids >= 0"),
]
Positive = Annotated[float, Field(gt=0), _need("a finite number > 0")]
OptionalPositive = Annotated[Positive | None, _need("null or a finite number > 0")]
NotNegative = Annotated[float, Field(ge=0), _need("a finite number >= 0")]
TopP = Annotated[float, Field(gt=0, le=1), _need("a number > 0 and <= 1")]
Decay = Annotated[float, Field(ge=0, lt=1), _need("a number >= 0 and < 1")]
FeatureNames = Annotated[
    Literal["recommended", "logits"] | Annotated[tuple[str, ...], Field(min_length=1)],
    _TUPLE,
    _need("recommended, logits, or a list of at least one feature name"),
]
Resources = Annotated[dict[Text, NotNegative], _need("a mapping from resource names to finite numbers >= 0")]
Tags = Annotated[dict[Text, Text], _need("a mapping from names to texts (a number needs quotes)")]
RuntimeEnv = Annotated[dict[str, JsonValue], _need("a mapping with string keys and plain, finite values")]
