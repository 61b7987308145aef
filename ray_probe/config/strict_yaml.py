"""Strict YAML: plain mappings, lists and scalars. Refuses all else with its line.

Scalars follow YAML 1.2 rather than 1.1, so `1e-3` is a number, and `on`, `no`, `1:30` and dates are strings.
"""

import re
import stat
from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml

from ray_probe.errors import ConfigError, bad_value, cut

MAX_BYTES = 1 << 20
MAX_DEPTH = 20

_WORDS = (
    dict.fromkeys(("", "~", "null", "Null", "NULL"))
    | dict.fromkeys(("true", "True", "TRUE"), True)
    | dict.fromkeys(("false", "False", "FALSE"), False)
)
# No leading zeros (octal or decimal? and a revision `0123` is a name) and no endless digits: those stay strings.
_INT = re.compile(r"[-+]?(?:0|[1-9][0-9]{0,39})")
_FLOAT = re.compile(
    r"[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)"
)


class _NotReadable(Exception):
    """A problem with its remedy, and its line."""

    def __init__(self, line: int, problem: str) -> None:
        self.line = line
        self.problem = " ".join(problem.split())
        super().__init__(self.problem)


class _Dumper(yaml.SafeDumper):
    """Quotes each string that YAML 1.1 or `load_yaml` would read as another value."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.Node:
        style = None if isinstance(_resolved(data), str) else "'"
        # In double quotes everything odd is escaped; in single quotes PyYAML turns U+0085 and U+2028 into spaces.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style if data.isprintable() else '"')


_Dumper.add_representer(str, _Dumper.represent_text)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping.

    Raises:
        ConfigError: with the file and, where there is one, the line.
    """
    shown = str(path) if str(path).isprintable() else repr(str(path))
    try:
        data = _parse(_read_text(Path(path)))
    except _NotReadable as error:
        raise ConfigError(f"{shown}:{error.line}: {error.problem}") from None
    if not isinstance(data, dict):
        raise ConfigError(bad_value(shown, data, "need a mapping at the top level, such as 'model: {path: DIR}'"))
    return data


def parse_scalar(text: str, field: str = "value") -> Any:
    """Read a value from the command line, such as `0.5` or `[H, top1]`.

    Raises:
        ConfigError: named after `field`.
    """
    if not _is_unicode(text):
        raise ConfigError(bad_value(field, text, "need text in UTF-8"))
    try:
        return _parse(text)
    except _NotReadable as error:
        raise ConfigError(bad_value(field, text, f"{error.problem}, or put the value in quotes")) from None


def apply_override(raw: dict[str, Any], override: str) -> None:
    """Set one `dotted.key=value` in raw data, in place; unknown keys are not refused.

    Raises:
        ConfigError: it has another form, or a part of the key before the last is no mapping.
    """
    key, value = override_of(override)
    parts = key.split(".")
    section = raw
    for depth, part in enumerate(parts[:-1], start=1):
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise ConfigError(bad_value(".".join(parts[:depth]), section, f"need a mapping to set {key!r}"))
    section[parts[-1]] = value


def override_of(override: str) -> tuple[str, Any]:
    """Returns key and value of one `dotted.key=value`. Raises ConfigError."""
    key, _, text = override.partition("=")
    if not text.strip() or not all(part and part.isprintable() and " " not in part for part in key.split(".")):
        raise ConfigError(bad_value("--set", override, "need dotted.key=value, as in estimator.baseline.mode=none"))
    return key, parse_scalar(text, key)


def dump_yaml_text(data: Mapping[str, object]) -> str:
    """Write plain data as YAML that `load_yaml` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _read_text(path: Path) -> str:
    remedy = "need the path of a YAML file"
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a directory, or a pipe that would block for ever
            raise ConfigError(bad_value("config", str(path), f"not a regular file, {remedy}"))
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(bad_value("config", str(path), f"no such file, {remedy}")) from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(bad_value("config", str(path), f"cannot be read ({reason}), {remedy}")) from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(bad_value("config", str(path), f"larger than {MAX_BYTES} bytes, need a smaller file"))
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        found = f"the byte 0x{raw[error.start]:02x} on line {line}"
        raise ConfigError(bad_value("config", str(path), f"{found} is not UTF-8, save the file as UTF-8")) from None


def _parse(text: str) -> Any:
    """Returns the plain value. Raises `_NotReadable` for each kind of error."""
    try:
        loader = yaml.SafeLoader(text)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _NotReadable(line, f"the character U+{error.character:04X} is not allowed in YAML; remove it") from None
    try:
        return _document(iter(loader.get_event, None))
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or loader.get_mark()
        raise _NotReadable(mark.line + 1, f"{problem}; correct the YAML") from None
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF" and the like
        raise _NotReadable(loader.get_mark().line + 1, f"{error}; correct the YAML") from None


def _document(events: Iterator[Any]) -> Any:
    """Returns the value of the only document; None if the text is empty."""
    next(events)  # of the stream
    if isinstance(next(events), yaml.StreamEndEvent):
        return None
    value = _value(next(events), events, 0)
    next(events)  # of the document's end
    if not isinstance(after := next(events), yaml.StreamEndEvent):
        raise _NotReadable(after.start_mark.line + 1, "another document starts here; correct the YAML")
    return value


def _value(event: Any, events: Iterator[Any], depth: int) -> Any:
    """Returns the value that begins with `event`, inside `depth` collections."""
    line = event.start_mark.line + 1
    if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
        raise _NotReadable(line, f"anchors and aliases ({cut(repr(event.anchor))}) are not taken; write the value out")
    if event.tag is not None:
        raise _NotReadable(line, f"the tag {cut(repr(event.tag))} is not taken; write a plain value")
    if isinstance(event, yaml.ScalarEvent):
        if not _is_unicode(event.value):
            raise _NotReadable(line, "half of a surrogate pair is no character; write the character itself")
        return _resolved(event.value) if event.implicit[0] else event.value
    if depth == MAX_DEPTH:
        raise _NotReadable(line, f"nested more than {MAX_DEPTH} levels deep; flatten it")
    inside = takewhile(lambda event: not isinstance(event, yaml.CollectionEndEvent), events)
    if isinstance(event, yaml.SequenceStartEvent):
        return [_value(item, events, depth + 1) for item in inside]
    items, lines = dict[str, Any](), dict[str, int]()
    for item in inside:
        line, key = item.start_mark.line + 1, _value(item, events, depth + 1)
        if not isinstance(key, str):
            raise _NotReadable(line, f"the key {cut(repr(key))} is not a string; put it in quotes")
        if key in items:
            raise _NotReadable(line, f"duplicate key {cut(repr(key))}, first on line {lines[key]}; keep one of the two")
        lines[key], items[key] = line, _value(next(events), events, depth + 1)
    return items


def _resolved(text: str) -> Any:
    """Returns the value of a scalar without quotes."""
    if text in _WORDS:
        return _WORDS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text.replace(".", "", 1) if text[-1] in "fFnN" else text)
    return text
