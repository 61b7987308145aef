"""Prompts from a JSONL file or a list, checked one by one.

Errors name the place (`file:line`, or `data.prompts[i]`) and what to do, but never quote a prompt.
"""

import codecs
import hashlib
import json
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from ray_probe.errors import MAX_VALUE_CHARS, PromptsError, bad_value

MAX_PROMPTS = 1_000_000
MAX_LINE_BYTES = 1 << 20
LIST_SOURCE = "<list>"


@dataclass(frozen=True)
class PromptSet:
    """Prompts in file order, with distinct ids.

    `lines` are the numbers behind `where`: lines of the file from 1, or indices into the list from 0.
    """

    texts: tuple[str, ...]
    ids: tuple[str, ...]
    lines: tuple[int, ...]
    source: str
    sha256: str
    """Over ids and texts in order, wherever they came from."""

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """Place of a prompt for messages: `file:line`, or `data.prompts[i]`."""
        return _place(self.source, self.lines[index])


class _Row(NamedTuple):
    line: int
    id: str
    text: object


def load_prompts(prompts: str | Path | Sequence[str], field: str = "prompt") -> PromptSet:
    """Read a JSONL file (each line an object with `field` and, if wished, `id`) or take a list of strings.

    Raises:
        PromptsError: with the place of the first thing that is wrong.
    """
    if isinstance(prompts, str | Path):
        source = str(prompts) if str(prompts).isprintable() else repr(str(prompts))
        return _collect(_rows_of_file(Path(prompts), source, field), source)
    return _collect((_Row(i, str(i), text) for i, text in enumerate(prompts)), LIST_SOURCE)


def _place(source: str, line: int) -> str:
    return f"data.prompts[{line}]" if source == LIST_SOURCE else f"{source}:{line}"


def _collect(rows: Iterator[_Row], source: str) -> PromptSet:
    texts: list[str] = []
    lines: list[int] = []
    line_of: dict[str, int] = {}
    digest = hashlib.sha256()
    for line, prompt_id, text in rows:
        where = _place(source, line)
        if len(texts) == MAX_PROMPTS:
            raise PromptsError(f"{where}: more than {MAX_PROMPTS} prompts; split the file")
        if not isinstance(text, str):
            raise PromptsError(f"{where}: the prompt is {_kind(text)}; need a string")
        if not text.strip():
            raise PromptsError(f"{where}: the prompt is blank; write a prompt or remove it")
        if prompt_id in line_of:
            first = _place(source, line_of[prompt_id])
            raise PromptsError(bad_value(f"{where}: id", prompt_id, f"already used at {first}, need distinct ids"))
        try:
            digest.update(json.dumps([prompt_id, text], ensure_ascii=False).encode("utf-8") + b"\n")
        except UnicodeEncodeError:
            raise PromptsError(f"{where}: half of a surrogate pair is no character; write valid Unicode") from None
        texts.append(text)
        lines.append(line)
        line_of[prompt_id] = line
    if not texts:
        raise PromptsError(
            bad_value("data.prompts", [] if source == LIST_SOURCE else source, "need at least one prompt")
        )
    return PromptSet(tuple(texts), tuple(line_of), tuple(lines), source, digest.hexdigest())


def _rows_of_file(path: Path, source: str, field: str) -> Iterator[_Row]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a directory, or a pipe that would block for ever
            raise PromptsError(bad_value("data.prompts", str(path), "not a regular file, need a JSONL file"))
        with path.open("rb") as file:
            for line, content in _lines_of_file(file, source):
                yield _row(content, line, _place(source, line), field)
    except FileNotFoundError:
        remedy = "no such file, need a JSONL file (relative paths start at the working directory)"
        raise PromptsError(bad_value("data.prompts", str(path), remedy)) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        reason = getattr(error, "strerror", None) or error
        raise PromptsError(
            bad_value("data.prompts", str(path), f"cannot be read ({reason}), need a JSONL file")
        ) from None


def _lines_of_file(file: IO[bytes], source: str) -> Iterator[tuple[int, str]]:
    """Line numbers and contents of the lines that are not blank; never more than one line in memory."""
    line = 0
    while raw := file.readline(MAX_LINE_BYTES + 5):  # room for a byte order mark and a line end
        line += 1
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


def _row(content: str, line: int, where: str, field: str) -> _Row:
    try:
        item = json.loads(content, object_pairs_hook=_distinct_keys, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
        raise PromptsError(f"{where}: not JSON ({reason}); need one object a line (JSONL)") from None
    if not isinstance(item, dict):
        raise PromptsError(f"{where}: {_kind(item)}; need an object such as {{{json.dumps(field)}: ...}}")
    if field not in item:
        names = _cut(", ".join(map(repr, item)) or "none")
        raise PromptsError(f"{where}: no field {field!r}; set data.field to one of the fields there: {names}")
    if not isinstance(item[field], str):
        raise PromptsError(f"{where}: {field}: {_kind(item[field])}; need a string")
    return _Row(line, _id(item, line, where), item[field])


def _id(item: dict[str, Any], line: int, where: str) -> str:
    value = item.get("id", f"line-{line}")
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise PromptsError(bad_value(f"{where}: id", value, "need a string that is not blank, or an integer"))
    return str(value)


def _distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    item = dict(pairs)
    if len(item) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {_cut(repr(next(key for key in keys if keys.count(key) > 1)))}")
    return item


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _kind(value: object) -> str:
    kinds = {"NoneType": "null", "str": "a string", "bool": "a boolean", "list": "a list", "dict": "an object"}
    return kinds.get(type(value).__name__, f"a number ({type(value).__name__})")


def _cut(text: str) -> str:
    return text if len(text) <= MAX_VALUE_CHARS else text[: MAX_VALUE_CHARS - 3] + "..."
