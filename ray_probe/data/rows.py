"""Rows of prompts, the same for every source, and the JSONL source.

Errors name the place (`file:line`, or `data.prompts[i]`) and what to do, but never quote a prompt.
"""

import codecs
import json
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

from ray_probe.errors import PromptsError, bad_value, cut

MAX_LINE_BYTES = 1 << 20
LIST_SOURCE = "<list>"
DEFAULT_ID_FIELD = "id"
OR_NO_IDS = ", or data.id_field: null to leave ids out"
_KINDS = {
    "NoneType": "null", "str": "a string", "bool": "a boolean", "list": "a list", "dict": "an object",
    "bytes": "binary", "int": "a number (int)", "float": "a number (float)",
}  # fmt: skip


class Row(NamedTuple):
    """One prompt as its source holds it, unchecked.

    Attributes:
        line: line of the file or row of the table, from 1; index into the list, from 0.
        id: the prompt's own id, or one made from `line`.
        value: a string, a list of messages, or an invalid value.
    """

    line: int
    id: str
    value: object


def place(source: str, line: int) -> str:
    """Returns the place of a prompt for messages: `file:line`, or `data.prompts[i]`."""
    return f"data.prompts[{line}]" if source == LIST_SOURCE else f"{source}:{line}"


def kind(value: object) -> str:
    """Returns the type of a value in words, without quoting the value."""
    name = type(value).__name__
    return _KINDS.get(name, f"of type {name}")


def no_field(field: str, there: Iterable[str], key: str = "data.field", otherwise: str = "") -> str:
    """Returns the error of a missing field or column, with the existing ones."""
    names = cut(", ".join(map(repr, there)) or "none")
    return f"no field {field!r}; set {key} to one of the fields there: {names}{otherwise}"


def check_id_field(id_field: str | None, there: Iterable[str], where: str) -> None:
    """Raises PromptsError for a missing id field, unless it is the default one."""
    if id_field not in (None, DEFAULT_ID_FIELD, *there):
        raise PromptsError(f"{where}: {no_field(str(id_field), there, 'data.id_field', OR_NO_IDS)}")


def id_of(item: Mapping[str, Any], line: int, where: str, id_field: str | None) -> str:
    """Returns the id of an object or table row, or its line without an id field.

    Raises PromptsError: the id is null, blank, or neither a string nor an integer.
    """
    if id_field is None or id_field not in item:
        return f"line-{line}"
    value = item[id_field]
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        remedy = f"need a string that is not blank, or an integer{OR_NO_IDS}"
        raise PromptsError(bad_value(f"{where}: {id_field}", value, remedy))
    return str(value)


def rows_of_jsonl(path: Path, source: str, field: str, id_field: str | None = DEFAULT_ID_FIELD) -> Iterator[Row]:
    """Yields rows of a file with one JSON object a line."""
    for line, content in _lines(path, source):
        where = place(source, line)
        item = _object(content, where, field)
        if field not in item:
            raise PromptsError(f"{where}: {no_field(field, item)}")
        check_id_field(id_field, item, where)
        yield Row(line, id_of(item, line, where, id_field), item[field])


def check_regular_file(path: Path, need: str) -> None:
    """Raises PromptsError unless the path is a regular file."""
    try:
        regular = stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        remedy = f"no such file, need {need} (relative paths start at the working directory)"
        raise PromptsError(bad_value("data.prompts", str(path), remedy)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise unreadable(str(path), error, need) from None
    if not regular:  # a directory, or a pipe that would block for ever
        raise PromptsError(bad_value("data.prompts", str(path), f"not a regular file, need {need}"))


def unreadable(source: str, error: Exception, need: str) -> PromptsError:
    """Returns an error of the file system, in one line."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    return PromptsError(bad_value("data.prompts", source, f"cannot be read ({reason}), need {need}"))


def _lines(path: Path, source: str) -> Iterator[tuple[int, str]]:
    check_regular_file(path, "a JSONL file")
    try:
        with path.open("rb") as file:
            yield from _lines_of_file(file, source)
    except OSError as error:
        raise unreadable(str(path), error, "a JSONL file") from None


def _lines_of_file(file: IO[bytes], source: str) -> Iterator[tuple[int, str]]:
    """Yields number and content of lines that are not blank, one in memory at a time."""
    line = 0
    while raw := file.readline(MAX_LINE_BYTES + 5):  # room for a byte order mark and a line end
        line += 1
        if line == 1 and raw.startswith(b"PAR1"):
            raise PromptsError(bad_value("data.prompts", source, "it is a parquet file; let its name end in .parquet"))
        content = (raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw).rstrip(b"\r\n")
        if len(content) > MAX_LINE_BYTES:
            raise PromptsError(f"{source}:{line}: longer than {MAX_LINE_BYTES} bytes; need one object a line (JSONL)")
        try:
            text = content.decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"the byte 0x{content[error.start]:02x} at column {error.start + 1} is not UTF-8"
            raise PromptsError(f"{source}:{line}: {found}; save the file as UTF-8") from None
        if text.strip():
            yield line, text


def _object(content: str, where: str, field: str) -> dict[str, Any]:
    try:
        item = json.loads(content, object_pairs_hook=_distinct_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise PromptsError(f"{where}: not JSON ({reason}); need one object a line (JSONL)") from None
    if not isinstance(item, dict):
        raise PromptsError(f"{where}: {kind(item)}; need an object such as {{{json.dumps(field)}: ...}}")
    return item


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {cut(repr(next(key for key in keys if keys.count(key) > 1)))}")
    return item


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
