"""A small, strict YAML reader: plain mappings, lists and scalars, and every surprise refused with its line.

Scalars follow YAML 1.2 rather than 1.1, so that `1e-3` is a number, and `on`, `no`, `1:30` and dates are strings.
"""

import re
import stat
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ray_probe.errors import MAX_VALUE_CHARS, ConfigError, bad_value

MAX_BYTES = 1 << 20
MAX_DEPTH = 20

_NULL = re.compile(r"^(?:~|null|Null|NULL|)$")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$")
# No leading zeros (octal or decimal? and a revision `0123` is a name) and no endless digits: those stay strings.
_INT = re.compile(r"^[-+]?(?:0|[1-9][0-9]{0,39})$")
_FLOAT = re.compile(
    r"^(?:[-+]?(?:(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN))$"
)
_RESOLVERS: tuple[tuple[str, re.Pattern[str], list[str]], ...] = (
    ("tag:yaml.org,2002:null", _NULL, ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", _BOOL, list("tTfF")),
    ("tag:yaml.org,2002:int", _INT, list("-+0123456789")),
    ("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789")),
)


class _NotReadable(Exception):
    """What is wrong, with its remedy, and on which line."""

    def __init__(self, line: int, problem: str) -> None:
        self.line = line
        self.problem = " ".join(problem.split())
        super().__init__(self.problem)


class _Loader(yaml.SafeLoader):
    """SafeLoader without anchors, tags, duplicate keys, deep nesting and the scalar types of YAML 1.1."""

    # A type of its own for each class: PyYAML copies a parent's resolvers, and those are YAML 1.1.
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        mark = event.start_mark
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _NotReadable(
                mark.line + 1, f"anchors and aliases ({_show(event.anchor)}) are not taken; write the value out"
            )
        if getattr(event, "tag", None) is not None:
            raise _NotReadable(mark.line + 1, f"the tag {_show(event.tag)} is not taken; write a plain value")
        if self._depth >= MAX_DEPTH and isinstance(event, yaml.CollectionStartEvent):
            raise _NotReadable(mark.line + 1, f"nested more than {MAX_DEPTH} levels deep; flatten it")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            mark = key_node.start_mark
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise _NotReadable(mark.line + 1, f"the key {_show(key)} is not a string; put it in quotes")
            if key in first_line:
                raise _NotReadable(
                    mark.line + 1, f"duplicate key {_show(key)}, first on line {first_line[key]}; keep one of the two"
                )
            first_line[key] = mark.line + 1
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        text = super().construct_scalar(node)
        if not _is_unicode(text):
            problem = "half of a surrogate pair is no character; write the character itself"
            raise _NotReadable(node.start_mark.line + 1, problem)
        return text


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string which YAML 1.1 or this module's loader would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, data: str) -> yaml.Node:
        # In double quotes everything odd is escaped; in single quotes PyYAML turns U+0085 and U+2028 into spaces.
        style = None if data.isprintable() else '"'
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_text)


for _tag, _pattern, _first in _RESOLVERS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


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
    """Read one value from the command line: a scalar, or a YAML flow list or mapping such as `[H, top1]`.

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
    """Set one `dotted.key=value` in raw data, in place; whether the key exists is for the config to say.

    Raises:
        ConfigError: when it has another form, or the way to the key leads through something else than a mapping.
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
    """Key and value of one `dotted.key=value`. Raises ConfigError when it has another form."""
    key, _, text = override.partition("=")
    if not text.strip() or not all(part and part.isprintable() and " " not in part for part in key.split(".")):
        raise ConfigError(bad_value("--set", override, "need dotted.key=value, as in estimator.baseline.mode=none"))
    return key, parse_scalar(text, key)


def dump_yaml_text(data: Mapping[str, object]) -> str:
    """Write plain data as YAML that `load_yaml` reads back unchanged."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _show(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."


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
    """The plain value, or `_NotReadable` whatever went wrong."""
    loader: _Loader | None = None
    try:
        loader = _Loader(text)
        return loader.get_single_data()
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _NotReadable(line, f"the character U+{error.character:04X} is not allowed in YAML; remove it") from None
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise _NotReadable(_line(error.problem_mark), f"{problem}; correct the YAML") from None
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF" and the like
        mark = loader.get_mark() if loader is not None else None
        raise _NotReadable(_line(mark), f"{error}; correct the YAML") from None
    finally:
        if loader is not None:
            loader.dispose()


def _line(mark: yaml.Mark | None) -> int:
    return 1 if mark is None else mark.line + 1
