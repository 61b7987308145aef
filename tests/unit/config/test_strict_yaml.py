import math
import os
import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ray_probe.config.strict_yaml import MAX_BYTES, MAX_DEPTH, apply_override, dump_yaml_text, load_yaml, parse_scalar
from ray_probe.errors import ConfigError


def written(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_yaml(path)
    message = str(caught.value)
    assert len(message.splitlines()) == 1, message
    return message


REFUSED = {
    "duplicate key": ("a: 1\nb: 2\na: 3\n", ":3: ", "duplicate key 'a'", "first on line 1", "keep one"),
    "duplicate key deep down": ("a:\n  b: 1\n  b: 2\n", ":3: ", "duplicate key 'b'", "first on line 2"),
    "duplicate key in quotes": ("a: 1\n'a': 2\n", ":2: ", "duplicate key 'a'", "first on line 1"),
    "duplicate key in a flow mapping": ("x: {a: 1, a: 2}\n", ":1: ", "duplicate key 'a'", "first on line 1"),
    "python tag": ("a: !!python/object/apply:os.system [id]\n", ":1: ", "python/object/apply:os.system", "plain value"),
    "python name tag": ("a: 1\nb: !!python/name:os.system\n", ":2: ", "python/name:os.system", "plain value"),
    "standard tag": ("a: !!str 1\n", ":1: ", "tag:yaml.org,2002:str", "plain value"),
    "tag of one's own": ("a: !x 1\n", ":1: ", "'!x'", "plain value"),
    "anchor": ("a: &x [1]\n", ":1: ", "anchors and aliases ('x')", "write the value out"),
    "alias": ("a: 1\nb: *x\n", ":2: ", "anchors and aliases ('x')", "write the value out"),
    "alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", ":1: ", "anchors and aliases ('a')"),
    "number as a key": ("a:\n  7: x\n", ":2: ", "key 7 is not a string", "quotes"),
    "list as a key": ("? [a]\n: 1\n", ":1: ", "key ['a'] is not a string", "quotes"),
    "two documents": ("a: 1\n---\nb: 2\n", ":2: ", "another document", "correct the YAML"),
    "broken flow list": ("a: [1, 2\nb: 3\n", ":2: ", "correct the YAML"),
    "tab as indentation": ("a:\n\tb: 1\n", ":2: ", "'\\t'", "correct the YAML"),
    "control character": ("a: 1\nb: \x01\n", ":2: ", "U+0001", "remove it"),
    "escape past Unicode": ('a: "\\UFFFFFFFF"\n', ":1: ", "correct the YAML"),
    "half of a surrogate pair": ('a: 1\nb: "\\ud800"\n', ":2: ", "surrogate", "write the character itself"),
    "empty file": ("", "got None", "need a mapping at the top level"),
    "only a comment": ("# nothing\n", "got None", "need a mapping at the top level"),
    "list at the top": ("- a\n- b\n", "got ['a', 'b']", "need a mapping at the top level"),
    "scalar at the top": ("hello\n", "got 'hello'", "need a mapping at the top level"),
    "Latin-1": (b"a: 1\nb: caf\xe9\n", "0xe9", "line 2", "save the file as UTF-8"),
    "UTF-16": ("a: 1\n".encode("utf-16"), "0xff", "save the file as UTF-8"),
}


@pytest.mark.parametrize(("content", "parts"), [(c, p) for c, *p in REFUSED.values()], ids=REFUSED)
def test_what_is_refused_is_named_with_file_line_and_remedy(tmp_path, content, parts):
    message = refusal(written(tmp_path, content))
    assert "run.yaml" in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "not a regular file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.symlink_to(path), "cannot be read"),
        (lambda path: path.write_bytes(b"a: 1 #" + b"x" * MAX_BYTES), f"larger than {MAX_BYTES} bytes"),
    ],
    ids=["missing", "directory", "pipe that would block", "symlink loop", "more than 1 MiB"],
)
def test_a_path_that_holds_no_yaml_file_is_refused_before_parsing(tmp_path, make, part):
    path = tmp_path / "run.yaml"
    make(path)
    start = time.monotonic()
    message = refusal(path)
    assert time.monotonic() - start < 1.0
    assert message.startswith("config: got ")
    assert part in message
    assert "need" in message


def test_a_path_with_control_characters_stays_on_one_line(tmp_path):
    path = tmp_path / "a\nb.yaml"
    path.write_text("- 1\n")
    assert "a\\nb.yaml" in refusal(path)
    assert "cannot be read" in refusal(Path("a\0b"))


@pytest.mark.parametrize(
    "text", ["[" * 500_000, "- " * 500_000, "{a: " * 250_000, "? " * 500_000], ids=["flow", "block", "mapping", "keys"]
)
def test_deep_nesting_is_refused_before_the_stack_is_in_danger(tmp_path, text):
    assert f"nested more than {MAX_DEPTH} levels" in refusal(written(tmp_path, text))


def test_nesting_up_to_the_limit_is_read(tmp_path):
    lists = MAX_DEPTH - 1  # the top level is a mapping
    assert load_yaml(written(tmp_path, f"a: {'[' * lists}{']' * lists}\n"))["a"] is not None
    assert "nested" in refusal(written(tmp_path, f"a: {'[' * MAX_DEPTH}{']' * MAX_DEPTH}\n"))


SCALARS = {
    "1e-3": 0.001,
    "1E5": 1e5,
    "1.": 1.0,
    ".5": 0.5,
    "-1.5e+3": -1500.0,
    "1.0e-3": 0.001,
    "1e400": math.inf,
    ".inf": math.inf,
    "-.inf": -math.inf,
    "7": 7,
    "+7": 7,
    "-0": 0,
    "true": True,
    "False": False,
    "null": None,
    "~": None,
    "yes": "yes",
    "on": "on",
    "no": "no",
    "010": "010",
    "0x10": "0x10",
    "1_000": "1_000",
    "1:30": "1:30",
    "2026-01-01": "2026-01-01",
    "nan": "nan",
    "1e": "1e",
    "9" * 5000: "9" * 5000,
    "'1'": "1",
    "[H, top1]": ["H", "top1"],
    "[1e-3, null]": [0.001, None],
    "{CPU: 1}": {"CPU": 1},
    "{<<: {a: 1}}": {"<<": {"a": 1}},
    r".*\.mlp\..*": r".*\.mlp\..*",
    "localhost:6379": "localhost:6379",
}


@pytest.mark.parametrize(("text", "value"), SCALARS.items(), ids=[text[:20] for text in SCALARS])
def test_scalars_are_read_alike_from_a_file_and_from_the_command_line(tmp_path, text, value):
    from_line, from_file = parse_scalar(text), load_yaml(written(tmp_path, f"a: {text}\n"))["a"]
    assert from_line == from_file == value
    assert type(from_line) is type(from_file) is type(value)


def test_nan_is_read_as_a_number_so_that_its_field_can_be_named_later():
    assert math.isnan(parse_scalar(".nan"))


@pytest.mark.parametrize("text", ["[a", "*x", "!!python/name:os.system", "a\udcff", "{a: 1, a: 2}", "\x1b"])
def test_a_bad_command_line_value_is_refused_by_field_and_value(text):
    with pytest.raises(ConfigError) as caught:
        parse_scalar(text, "batch.rounds")
    message = str(caught.value)
    assert message.startswith(f"batch.rounds: got {text!r}; ")
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("raw", "override", "result"),
    [
        ({}, "a.b.c=1", {"a": {"b": {"c": 1}}}),
        ({"a": {"b": 1, "c": 2}}, "a.b=x=y", {"a": {"b": "x=y", "c": 2}}),
        ({"a": None}, "a.b=null", {"a": {"b": None}}),
        ({"a": {"b": {"c": 1}}}, "a.b={d: 2}", {"a": {"b": {"d": 2}}}),
    ],
    ids=["makes sections", "keeps siblings and later equal signs", "fills an empty section", "replaces a mapping"],
)
def test_an_override_sets_one_key(raw, override, result):
    apply_override(raw, override)
    assert raw == result


@pytest.mark.parametrize("override", ["a.b", "a.b=", "=1", "a..b=1", ".a=1", "a b=1", "a\n=1", ""])
def test_a_malformed_override_is_answered_with_the_form_to_use(override):
    with pytest.raises(ConfigError) as caught:
        apply_override({}, override)
    assert str(caught.value).startswith(f"--set: got {override!r}; need dotted.key=value")


def test_an_override_below_a_value_names_that_value():
    with pytest.raises(ConfigError, match=r"^a\.b: got 4; need a mapping to set 'a\.b\.c'$"):
        apply_override({"a": {"b": 4}}, "a.b.c=1")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text()
    | st.sampled_from(
        ["1e-3", "1.", "yes", "010", "~", "", " a ", "a: b", "- a", "#", "\u2028", "\ufeff", "1:30", "="]
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_what_is_dumped_is_read_back_unchanged(data):
    assert parse_scalar(dump_yaml_text(data)) == data


def test_shared_lists_are_dumped_without_aliases():
    shared = ["x"]
    assert parse_scalar(dump_yaml_text({"a": shared, "b": shared})) == {"a": ["x"], "b": ["x"]}


def test_dumps_read_alike_in_yaml_1_1_tools():
    data = {"a": "yes", "b": "1e-3", "c": 1e-3, "d": "1:30", "e": "2026-01-01", "f": "010"}
    assert yaml.safe_load(dump_yaml_text(data)) == data
