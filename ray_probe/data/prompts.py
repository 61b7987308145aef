"""Prompts from a JSONL or parquet file, a data set or a list, checked one by one.

Errors name the place (`file:line`, or `data.prompts[i]`) and what to do, but never quote a prompt.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_probe.data.chat_template import Message, checked_messages
from ray_probe.data.rows import DEFAULT_ID_FIELD, LIST_SOURCE, OR_NO_IDS, Row, kind, place, rows_of_jsonl
from ray_probe.data.tables import DATASETS_PREFIX, DatasetRef, rows_of_dataset, rows_of_parquet
from ray_probe.errors import PromptsError, bad_value

MAX_PROMPTS = 1_000_000

Prompt = str | list[Message]
Render = Callable[[Prompt, str], str]
"""Puts a prompt through a chat template; the second argument is its place, for messages."""


@dataclass(frozen=True)
class PromptSet:
    """Prompts in the order of their source, with distinct ids.

    `texts` are what the model sees, after the chat template if there is one. `lines` number lines of a file or rows of
    a table from 1, or list entries from 0.
    """

    texts: tuple[str, ...]
    ids: tuple[str, ...]
    lines: tuple[int, ...]
    source: str
    sha256: str
    """Over ids and prompts in order, before a template."""
    rendered_sha256: str | None = None
    """Over the texts in order; None without a template."""

    def __len__(self) -> int:
        return len(self.texts)

    def where(self, index: int) -> str:
        """Returns the place of a prompt for messages: `file:line`, or `data.prompts[i]`."""
        return place(self.source, self.lines[index])


def load_prompts(
    prompts: str | Path | Sequence[str],
    field: str = "prompt",
    render: Render | None = None,
    local_files_only: bool = True,
    id_field: str | None = DEFAULT_ID_FIELD,
) -> PromptSet:
    """Read and check all prompts; only their texts are held.

    Args:
        prompts: path of a JSONL file (each line an object with `field` and optionally `id_field`) or of a `.parquet`
            file (the same as columns), `datasets:NAME[:[CONFIG:]SPLIT]`, or a list of strings.
        field: field or column that holds a string or, with a template, a list of messages.
        render: the chat template; None: strings are used unchanged.
        local_files_only: never use the network for a data set.
        id_field: field or column that holds the prompt's id; None, or equal to `field`: ids are line numbers.

    Raises:
        PromptsError: names the place of the first error.
        ConfigError: the source is invalid, or needs a package that is not installed.
    """
    if not isinstance(prompts, str | Path):
        listed = (Row(index, str(index), text) for index, text in enumerate(prompts))
        return _collect(listed, LIST_SOURCE, "the prompt is", render)
    source = str(prompts) if str(prompts).isprintable() else repr(str(prompts))
    ids_from = None if id_field == field else id_field  # messages quote ids, and must not quote prompts
    rows = _rows(prompts, source, field, ids_from, local_files_only)
    return _collect(rows, source, f"{field}:", render, ids_from)


def absolute_source(prompts: str) -> str:
    """Returns the source with an absolute path."""
    if prompts.startswith(DATASETS_PREFIX):
        return DatasetRef.parse(prompts).absolute()
    return str(Path(prompts).resolve())


def _rows(
    prompts: str | Path, source: str, field: str, id_field: str | None, local_files_only: bool
) -> Iterator[Row]:
    if str(prompts).startswith(DATASETS_PREFIX):
        return rows_of_dataset(DatasetRef.parse(str(prompts)), source, field, id_field, local_files_only)
    path = Path(prompts)
    return (rows_of_parquet if path.suffix.lower() == ".parquet" else rows_of_jsonl)(path, source, field, id_field)


def _collect(
    rows: Iterator[Row], source: str, subject: str, render: Render | None, id_field: str | None = None
) -> PromptSet:
    texts: list[str] = []
    lines: list[int] = []
    line_of: dict[str, int] = {}
    given, rendered = hashlib.sha256(), hashlib.sha256()
    for line, prompt_id, value in rows:
        where = place(source, line)
        if len(texts) == MAX_PROMPTS:
            raise PromptsError(f"{where}: more than {MAX_PROMPTS} prompts; split the file")
        prompt = _checked(value, where, subject, chat=render is not None)
        if prompt_id in line_of:
            first = place(source, line_of[prompt_id])
            remedy = f"already used at {first}, need distinct ids{OR_NO_IDS}"
            raise PromptsError(bad_value(f"{where}: {id_field}", prompt_id, remedy))
        given.update(_bytes([prompt_id, prompt], where))
        texts.append(str(prompt) if render is None else render(prompt, where))
        if render is not None:
            rendered.update(_bytes(texts[-1], where))
        lines.append(line)
        line_of[prompt_id] = line
    if not texts:
        raise PromptsError(
            bad_value("data.prompts", [] if source == LIST_SOURCE else source, "need at least one prompt")
        )
    rendered_sha256 = None if render is None else rendered.hexdigest()
    return PromptSet(tuple(texts), tuple(line_of), tuple(lines), source, given.hexdigest(), rendered_sha256)


def _checked(value: object, where: str, subject: str, chat: bool) -> Prompt:
    """Returns a string that is not blank, or messages. Raises PromptsError."""
    if isinstance(value, list) and chat:
        return checked_messages(value, where)
    if isinstance(value, list):
        remedy = "need a string, or data.chat_template: true for a list of messages"
        raise PromptsError(f"{where}: {subject} a list; {remedy}")
    if not isinstance(value, str):
        raise PromptsError(f"{where}: {subject} {kind(value)}; need a string{' or a list of messages' * chat}")
    if not value.strip():
        raise PromptsError(f"{where}: the prompt is blank; write a prompt or remove it")
    return value


def _bytes(item: object, where: str) -> bytes:
    try:
        return json.dumps(item, ensure_ascii=False).encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        raise PromptsError(f"{where}: half of a surrogate pair is no character; write valid Unicode") from None
