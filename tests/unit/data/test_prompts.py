import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest

from ray_probe.data import prompts
from ray_probe.data.prompts import PromptSet, load_prompts
from ray_probe.data.rows import MAX_LINE_BYTES
from ray_probe.errors import PromptsError

SECRET = "attack at dawn"


def written(tmp_path: Path, content: str | bytes) -> str:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return str(path)


def refusal(source: object, field: str = "prompt") -> str:
    with pytest.raises(PromptsError) as caught:
        load_prompts(source, field)  # type: ignore[arg-type]
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


def lines(*items: object) -> str:
    return "".join(json.dumps(item) + "\n" for item in items)


GOOD = '{"prompt": "a"}\n'
REFUSED_LINES = {
    "not JSON": (GOOD + "{prompt}\n", ":2: not JSON (Expecting property name", "need one object a line"),
    "plain text": (f"{SECRET}\n", ":1: not JSON (Expecting value", "need one object a line"),
    "half a line": ('{"prompt": "a"', ":1: not JSON (", "need one object a line"),
    "two objects on a line": ('{"prompt": "a"} {"prompt": "b"}\n', ":1: not JSON (Extra data", "one object a line"),
    "NaN": (GOOD + '{"prompt": "a", "x": NaN}\n', ":2: not JSON (NaN is not JSON)", "need one object a line"),
    "infinity": ('{"prompt": "a", "x": -Infinity}\n', ":1: not JSON (-Infinity is not JSON)", "need one object"),
    "duplicate key": ('{"prompt": "a", "prompt": "b"}\n', ":1: not JSON (duplicate key 'prompt')", "need one object"),
    "duplicate key deep down": ('{"prompt": "a", "x": {"y": 1, "y": 2}}\n', "duplicate key 'y'", "need one object"),
    "nested past the stack": (GOOD + "[" * 200_000, ":2: not JSON (nested too deeply)", "need one object"),
    "endless number": ('{"prompt": "a", "x": ' + "9" * 5000 + "}", ":1: not JSON (", "need one object"),
    "a list": (GOOD + lines([1]), ":2: a list; need an object such as {\"prompt\": ...}"),
    "a string": (lines(SECRET), ":1: a string; need an object"),
    "null": ("null\n", ":1: null; need an object"),
    "no such field": (lines({"text": SECRET, "id": 7}), ":1: no field 'prompt'", "set data.field", "'text', 'id'"),
    "no field at all": (lines({}), ":1: no field 'prompt'", "fields there: none"),
    "field is a number": (lines({"prompt": 7}), ":1: prompt: a number (int); need a string"),
    "field is null": (GOOD + lines({"prompt": None}), ":2: prompt: null; need a string"),
    "field is a chat": (
        lines({"prompt": [{"role": "user", "content": SECRET}]}),
        ":1: prompt: a list; need a string, or data.chat_template: true for a list of messages",
    ),
    "blank prompt": (GOOD + lines({"prompt": " \n\t"}), ":2: the prompt is blank; write a prompt or remove it"),
    "empty prompt": (lines({"prompt": ""}), ":1: the prompt is blank"),
    "repeated id": (
        lines({"prompt": SECRET, "id": "x"}, {"prompt": "b"}, {"prompt": "c", "id": "x"}),
        ":3: id: got 'x'; already used at ", "p.jsonl:1, need distinct ids",
    ),
    "id repeated as a number": (lines({"prompt": "a", "id": "7"}, {"prompt": "b", "id": 7}), ":2: id: got '7'"),
    "id like an automatic one": (lines({"prompt": "a", "id": "line-2"}, {"prompt": "b"}), ":2: id: got 'line-2'"),
    "id is a boolean": (lines({"prompt": "a", "id": True}), ":1: id: got True; need a string", "or an integer"),
    "id is a fraction": (lines({"prompt": "a", "id": 1.5}), ":1: id: got 1.5; need a string"),
    "id is null": (lines({"prompt": "a", "id": None}), ":1: id: got None; need a string"),
    "blank id": (lines({"prompt": "a", "id": " "}), ":1: id: got ' '; need a string that is not blank"),
    "half of a surrogate pair": ('{"prompt": "\\ud800"}\n', ":1: half of a surrogate pair", "write valid Unicode"),
    "Latin-1": (GOOD.encode() + b'{"prompt": "caf\xe9"}\n', ":2: the byte 0xe9 at column 16 is not UTF-8", "save"),
    "UTF-16": (GOOD.encode("utf-16"), ":1: the byte 0xff at column 1 is not UTF-8", "save the file as UTF-8"),
    "line past 1 MiB": (GOOD + lines({"prompt": "x" * MAX_LINE_BYTES}), ":2: longer than 1048576 bytes", "need one"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "parts"), [(c, p) for c, *p in REFUSED_LINES.values()], ids=REFUSED_LINES)
def test_a_bad_line_is_refused_by_file_line_and_remedy_and_never_quoted(tmp_path, content, parts):
    message = refusal(written(tmp_path, content))
    assert "p.jsonl:" in message
    for part in parts:
        assert part in message
    assert SECRET not in message
    assert len(message) < 400 + len(str(tmp_path))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.write_text(""), "need at least one prompt"),
        (lambda path: path.write_text("\n \n\t\n"), "need at least one prompt"),
    ],
    ids=["missing", "directory", "pipe that would block", "symlink loop", "empty", "only blank lines"],
)
def test_a_path_that_holds_no_prompts_is_refused_by_field_and_value(tmp_path, make, part):
    path = tmp_path / "p"
    make(path)
    message = refusal(str(path))
    assert message.startswith("data.prompts: got '")
    assert part in message
    assert "need" in message


def test_a_path_with_control_characters_stays_on_one_line(tmp_path):
    path = tmp_path / "a\nb"
    path.write_text("x")
    assert "a\\nb" in refusal(str(path))
    assert "cannot be read" in refusal("a\0b")


REFUSED_LISTS = {
    "empty list": ([], "data.prompts: got []; need at least one prompt"),
    "not a string": (["a", 7], "data.prompts[1]: the prompt is a number (int); need a string"),
    "blank": (["a", "b", " "], "data.prompts[2]: the prompt is blank; write a prompt or remove it"),
    "half of a surrogate pair": (["\ud800"], "data.prompts[0]: half of a surrogate pair"),
}


@pytest.mark.parametrize(("given", "start"), REFUSED_LISTS.values(), ids=REFUSED_LISTS)
def test_a_bad_list_is_refused_by_index_and_remedy(given, start):
    assert refusal(given).startswith(start)


@pytest.mark.parametrize("kind", ["file", "list"])
def test_there_is_a_largest_number_of_prompts(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 3)
    as_kind = {"file": lambda texts: written(tmp_path, lines(*[{"prompt": t} for t in texts])), "list": list}[kind]
    assert len(load_prompts(as_kind("abc"), "prompt")) == 3
    assert "more than 3 prompts; split the file" in refusal(as_kind("abcd"))


def test_a_file_is_read_in_order_with_its_line_numbers_and_ids(tmp_path):
    items = [{"prompt": "a", "id": "x"}, {"prompt": "ü 😀", "id": -3, "other": [1e-3, None]}]
    content = "\n".join([json.dumps(items[0]), "", "  ", json.dumps(items[1], ensure_ascii=False), GOOD])
    source = written(tmp_path, content)
    loaded = load_prompts(source, "prompt")
    assert loaded.texts == ("a", "ü 😀", "a")
    assert loaded.ids == ("x", "-3", "line-5")
    assert loaded.lines == (1, 4, 5)
    assert loaded.source == source
    assert loaded.where(1) == f"{source}:4"
    assert load_prompts(Path(source), "prompt") == loaded


def test_a_list_is_numbered_from_zero():
    loaded = load_prompts(["a", "b"], "whatever")
    assert (loaded.texts, loaded.ids, loaded.lines) == (("a", "b"), ("0", "1"), (0, 1))
    assert loaded.where(1) == "data.prompts[1]"


@pytest.mark.parametrize(
    "content",
    [GOOD, GOOD.encode("utf-8-sig"), GOOD.replace("\n", "\r\n"), GOOD.strip(), '{"prompt": "\\u0061"}', "\n" + GOOD],
    ids=["plain", "byte order mark", "CRLF", "no last newline", "escaped", "blank line first"],
)
def test_ways_to_write_the_same_prompt_read_alike(tmp_path, content):
    assert load_prompts(written(tmp_path, content), "prompt").texts == ("a",)


def test_a_unicode_line_separator_inside_a_prompt_ends_no_line(tmp_path):
    content = json.dumps({"prompt": "a\u2028b\u0085c"}, ensure_ascii=False)
    assert load_prompts(written(tmp_path, content), "prompt").texts == ("a\u2028b\u0085c",)


@pytest.mark.parametrize("end", ["", "\n", "\r\n"], ids=["no line end", "LF", "CRLF"])
def test_a_line_of_exactly_one_mebibyte_is_read(tmp_path, end):
    text = "x" * (MAX_LINE_BYTES - len('{"prompt": ""}'))
    content = b"\xef\xbb\xbf" + json.dumps({"prompt": text}).encode() + end.encode() + GOOD.encode() * bool(end)
    assert load_prompts(written(tmp_path, content), "prompt").texts[0] == text


def test_another_field_can_hold_the_prompt(tmp_path):
    source = written(tmp_path, lines({"question": "why", "prompt": 7}))
    assert load_prompts(source, "question").texts == ("why",)


def test_the_fingerprint_is_of_texts_ids_and_order_and_of_nothing_else(tmp_path):
    plain = load_prompts(["a", "b"], "prompt").sha256
    assert plain == hashlib.sha256(b'["0", "a"]\n["1", "b"]\n').hexdigest()
    same = lines({"prompt": "a", "id": 0, "x": 1}) + "\n" + lines({"prompt": "b", "id": "1"})
    assert load_prompts(written(tmp_path, same), "prompt").sha256 == plain
    other_id = lines({"prompt": "a", "id": 0}, {"prompt": "b", "id": "2"})
    others = [load_prompts(given, "prompt").sha256 for given in (["b", "a"], ["a"], ["a", "b", "c"], ["ab"])]
    others.append(load_prompts(written(tmp_path, other_id), "prompt").sha256)
    assert len({plain, *others}) == 6


def test_a_prompt_set_cannot_be_changed():
    loaded: PromptSet = load_prompts(["a"], "prompt")
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.texts = ()  # type: ignore[misc]


def test_the_file_is_opened_once(tmp_path, monkeypatch):
    source, opened = written(tmp_path, GOOD), []
    original = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *args: opened.append(self) or original(self, *args))
    load_prompts(source, "prompt")
    assert opened == [Path(source)]
