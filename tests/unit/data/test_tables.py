"""Prompts from parquet files and data sets: the same prompts as from JSONL, and one line for what is wrong."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.jobs import write_jsonl

from ray_probe.data import prompts
from ray_probe.data.prompts import PromptSet, absolute_source, load_prompts
from ray_probe.data.rows import rows_of_jsonl
from ray_probe.errors import ConfigError, InputError, PromptsError

datasets = pytest.importorskip("datasets")
pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

SECRET = "attack at dawn"
Items = list[dict[str, Any]]
ITEMS: Items = [{"prompt": "a", "id": "x", "n": 1}, {"prompt": "ü 😀 ", "id": "y", "n": 2}]
CHATS: Items = [
    {"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}], "id": 5},
    {"prompt": [{"role": "user", "content": "b"}], "id": 6},
]


@pytest.fixture(autouse=True)
def quiet_and_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Nothing is cached in the home directory, and no progress bar is left on or off."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def as_parquet(directory: Path, items: Items) -> str:
    parquet.write_table(pa.Table.from_pylist(items), directory / "p.parquet")
    return str(directory / "p.parquet")


def as_jsonl(directory: Path, items: Items) -> str:
    return str(write_jsonl(directory / "p.jsonl", items))


def as_saved(directory: Path, items: Items) -> str:
    datasets.Dataset.from_list(items).save_to_disk(directory / "saved")
    return f"datasets:{directory / 'saved'}"


def as_saved_splits(directory: Path, items: Items) -> str:
    splits = {"train": datasets.Dataset.from_list(items[:1]), "test": datasets.Dataset.from_list(items)}
    datasets.DatasetDict(splits).save_to_disk(directory / "splits")
    return f"datasets:{directory / 'splits'}:test"


def as_parquet_directory(directory: Path, items: Items) -> str:
    (directory / "d").mkdir()
    for name, part in (("train", items[:1]), ("test", items)):
        parquet.write_table(pa.Table.from_pylist(part), directory / "d" / f"{name}.parquet")
    return f"datasets:{directory / 'd'}:test"


def as_jsonl_directory(directory: Path, items: Items) -> str:
    (directory / "j").mkdir()
    write_jsonl(directory / "j" / "some.jsonl", items)
    return f"datasets:{directory / 'j'}"


def as_configuration(directory: Path, items: Items) -> str:
    """A directory whose card names configurations, as `OWNER/NAME:CONFIG:SPLIT` does on the hub."""
    (directory / "c").mkdir()
    for name in ("main", "socratic"):
        write_jsonl(directory / "c" / f"{name}.jsonl", items if name == "main" else items[:1])
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n  - split: test\n    path: {name}.jsonl\n"
        for name in ("main", "socratic")
    )
    (directory / "c" / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return f"datasets:{directory / 'c'}:main:test"


TABLES = [as_parquet, as_saved, as_saved_splits, as_parquet_directory, as_jsonl_directory, as_configuration]
Writer = Callable[[Path, Items], str]


def rendered(prompt: Any, where: str) -> str:
    return repr(prompt)


def load(source: str, field: str = "prompt", chat: bool = False) -> PromptSet:
    return load_prompts(source, field, rendered if chat else None)


def refusal(source: str, field: str = "prompt", chat: bool = False, error: type[InputError] = PromptsError) -> str:
    with pytest.raises(error) as caught:
        load(source, field, chat)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and caught.value.exit_code == 2, message
    assert SECRET not in message
    return message


@pytest.mark.parametrize("write", TABLES)
@pytest.mark.parametrize("items", [ITEMS, CHATS, [{"prompt": "a"}, {"prompt": "b"}]], ids=["texts", "chats", "no id"])
def test_the_same_prompts_are_the_same_set_wherever_they_came_from(tmp_path: Path, write: Writer, items: Items):
    chat = items is CHATS
    expected, source = load(as_jsonl(tmp_path, items), chat=chat), write(tmp_path, items)
    found = load(source, chat=chat)
    assert (found.texts, found.ids, found.lines) == (expected.texts, expected.ids, expected.lines)
    assert (found.sha256, found.rendered_sha256) == (expected.sha256, expected.rendered_sha256)
    assert found.where(1) == f"{source}:2"


BAD_IDS = {"null": ["x", None], "fractions": [0.5, 1.5], "repeated": [7, 7], "a column of pandas": [1.0, None]}


@pytest.mark.parametrize("write", [as_jsonl, *TABLES])
@pytest.mark.parametrize("ids", BAD_IDS.values(), ids=BAD_IDS)
def test_unusable_ids_are_refused_with_the_key_that_leaves_them_out(tmp_path: Path, write: Writer, ids: list[Any]):
    texts = ["a", "b"]
    source = write(tmp_path, [{"prompt": text, "id": one} for text, one in zip(texts, ids, strict=True)])
    assert refusal(source).endswith(", or data.id_field: null to leave ids out")
    left_out = load_prompts(source, id_field=None)
    plain = load_prompts(as_jsonl(tmp_path, [{"prompt": text} for text in texts]))
    assert (left_out.texts, left_out.ids, left_out.sha256) == (plain.texts, ("line-1", "line-2"), plain.sha256)


@pytest.mark.parametrize("write", [as_jsonl, *TABLES])
def test_another_column_can_hold_the_ids(tmp_path: Path, write: Writer):
    source = write(tmp_path, [{"prompt": "a", "id": 5, "uid": "x"}, {"prompt": "b", "id": 5, "uid": "y"}])
    assert load_prompts(source, id_field="uid").ids == ("x", "y")
    with pytest.raises(PromptsError, match=r"no field 'key'; set data\.id_field to one of the fields there: .*'uid'"):
        load_prompts(source, id_field="key")
    assert load_prompts(source, "uid", id_field="uid").ids == ("line-1", "line-2"), "a prompt is never quoted as an id"


def test_another_column_can_hold_the_prompt_even_one_that_is_called_id_or_has_a_dot(tmp_path: Path):
    source = as_parquet(tmp_path, [{"prompt": 7, "id": "why", "a.b": "so"}])
    assert (load(source, "id").texts, load(source, "a.b").texts) == (("why",), ("so",))


@pytest.mark.parametrize("write", [as_parquet, as_saved, as_parquet_directory])
def test_prompts_of_many_batches_keep_their_order_and_rows(tmp_path: Path, write: Writer):
    found = load(write(tmp_path, [{"prompt": f"p{i}"} for i in range(2500)]))
    assert found.texts == tuple(f"p{i}" for i in range(2500))
    assert (found.lines[-1], found.ids[-1]) == (2500, "line-2500")


def test_row_groups_of_a_parquet_file_are_read_through(tmp_path: Path):
    table = pa.Table.from_pylist([{"prompt": f"p{i}"} for i in range(10)])
    parquet.write_table(table, tmp_path / "p.parquet", row_group_size=3)
    assert load(str(tmp_path / "p.parquet")).lines == tuple(range(1, 11))


@pytest.mark.parametrize("write", [as_parquet, as_saved, as_jsonl_directory])
def test_there_is_a_largest_number_of_prompts(tmp_path: Path, write: Writer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prompts, "MAX_PROMPTS", 3)
    source = write(tmp_path, [{"prompt": text} for text in "abcd"])
    assert refusal(source) == f"{source}:4: more than 3 prompts; split the file"


def test_a_dictionary_column_holds_strings_too(tmp_path: Path):
    column = pa.array(["a", "b", "a"]).dictionary_encode()
    parquet.write_table(pa.table({"prompt": column}), tmp_path / "p.parquet")
    assert load(str(tmp_path / "p.parquet")).texts == ("a", "b", "a")


# What is refused in rows


BAD_ROWS: dict[str, tuple[Items, str]] = {
    "null": ([{"prompt": "a"}, {"prompt": None}], ":2: prompt: null; need a string"),
    "a number": ([{"prompt": 7}], ":1: prompt: a number (int); need a string"),
    "binary": ([{"prompt": SECRET.encode()}], ":1: prompt: binary; need a string"),
    "a chat": (CHATS, ":1: prompt: a list; need a string, or data.chat_template: true for a list of messages"),
    "blank": ([{"prompt": "a"}, {"prompt": "\n"}], ":2: the prompt is blank; write a prompt or remove it"),
    "no column": (
        [{"text": SECRET, "id": 7}],
        ": no field 'prompt'; set data.field to one of the fields there: 'text'",
    ),
    "repeated id": ([{"prompt": SECRET, "id": "x"}, {"prompt": "b", "id": "x"}], ":2: id: got 'x'; already used at "),
    "id null": ([{"prompt": "a", "id": "x"}, {"prompt": "b", "id": None}], ":2: id: got None; need a string"),
    "id a fraction": ([{"prompt": "a", "id": 1.5}], ":1: id: got 1.5; need a string that is not blank, or an integer"),
}


@pytest.mark.parametrize("write", [as_parquet, as_saved, as_parquet_directory])
@pytest.mark.parametrize(("items", "part"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_refused_by_place_and_remedy(tmp_path: Path, write: Writer, items: Items, part: str):
    source = write(tmp_path, items)
    assert refusal(source).startswith(source + part)


def test_a_chat_with_a_bad_message_is_refused_by_row(tmp_path: Path):
    items = [*CHATS, {"prompt": [{"role": "user", "content": None}], "id": 7}]
    assert ":3: message 0: content is null; need a string" in refusal(as_parquet(tmp_path, items), chat=True)


def test_a_text_that_is_not_utf8_is_refused_by_row(tmp_path: Path):
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0"), pa.py_buffer(b"a\xe9"))
    parquet.write_table(pa.table({"prompt": broken}), tmp_path / "p.parquet")
    assert refusal(str(tmp_path / "p.parquet")).endswith("p.parquet:2: a text is not UTF-8; write the file again from "
                                                         "valid Unicode")  # fmt: skip


# What is refused of a source


def cut_in_the_middle(path: Path) -> None:
    content = Path(as_parquet(path.parent, [{"prompt": "a" * 100}])).read_bytes()
    path.write_bytes(content[:30] + content[40:])


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda path: None, "no such file, need a parquet file"),
        (lambda path: path.mkdir(), "not a regular file, need a parquet file"),
        (lambda path: os.mkfifo(path), "not a regular file"),
        (lambda path: path.write_text('{"prompt": "attack at dawn"}\n'), "cannot be read (Parquet magic bytes not"),
        (lambda path: path.write_text(""), "cannot be read (Parquet file size is 0 bytes"),
        (cut_in_the_middle, "cannot be read ("),
        (lambda path: parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), path), "need at least one"),
    ],
    ids=["missing", "directory", "pipe", "JSONL", "empty file", "damaged", "no row"],
)
def test_a_path_that_is_no_parquet_file_is_refused_by_field_and_value(tmp_path: Path, make: Any, part: str):
    make(tmp_path / "q.parquet")
    message = refusal(str(tmp_path / "q.parquet"))
    assert message.startswith("data.prompts: got '") and part in message


def test_a_parquet_file_by_another_name_is_told_from_a_broken_jsonl_file(tmp_path: Path):
    file = Path(as_parquet(tmp_path, ITEMS))
    assert refusal(str(file.rename(tmp_path / "p.pq"))).endswith("it is a parquet file; let its name end in .parquet")
    assert load(str((tmp_path / "p.pq").rename(tmp_path / "p.PARQUET"))).ids == ("x", "y")


def test_two_columns_of_one_name_are_refused(tmp_path: Path):
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    parquet.write_table(twice, tmp_path / "p.parquet")
    assert "several columns are called 'prompt'; rename all but one" in refusal(str(tmp_path / "p.parquet"))


@pytest.mark.parametrize(
    ("write", "split", "part"),
    [
        (as_saved_splits, ":dev", "no split 'dev'; name one of those there: train, test"),
        (as_saved_splits, "", "name one of its splits: train, test"),
        (as_parquet_directory, ":dev", "no split 'dev'; name one of those there: "),
        (as_parquet_directory, "", "name one of its splits: "),
        (as_saved, ":train", "it has no splits; leave ':train' out"),
    ],
)
def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path, write: Writer, split: str, part: str):
    directory = write(tmp_path, ITEMS).removeprefix("datasets:").removesuffix(":test")
    message = refusal(f"datasets:{directory}{split}")
    assert message.startswith("data.prompts: got 'datasets:") and part in message


def test_a_saved_split_knows_its_name(tmp_path: Path):
    datasets.Dataset.from_list(ITEMS, split="test").save_to_disk(tmp_path / "one")
    assert load(f"datasets:{tmp_path / 'one'}:test").texts == load(f"datasets:{tmp_path / 'one'}").texts
    assert "it has only the split 'test'; leave ':train' out" in refusal(f"datasets:{tmp_path / 'one'}:train")


def test_a_configuration_that_is_not_named_is_refused_with_those_there(tmp_path: Path):
    message = refusal(as_configuration(tmp_path, ITEMS).replace(":main:", ":"))
    assert "Config name is missing" in message and message.endswith("check its name, configuration and files")


@pytest.mark.parametrize("reference", ["datasets:", "datasets::train", "datasets:a/b:", "datasets:a/b:c:d:e"])
def test_a_reference_that_names_nothing_is_refused(reference: str):
    message = refusal(reference, error=ConfigError)
    assert message.startswith(f"data.prompts: got {reference!r}; need datasets:OWNER/NAME:SPLIT")


@pytest.mark.parametrize("name", ["nowhere", "/no/where", "./no", "json", "a/b/c"])
def test_what_is_neither_a_directory_nor_a_name_on_the_hub_is_refused(name: str):
    assert "; no such directory, and not the OWNER/NAME of a data set; need " in refusal(f"datasets:{name}:train")


@pytest.fixture
def looked_up(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Hosts that were asked for: the network, as far as these tests go."""
    hosts: list[Any] = []
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: hosts.append(args[0]) or [])
    return hosts


def test_a_data_set_that_is_not_in_the_cache_is_refused_without_a_look_at_the_network(looked_up: list[Any]):
    before = datasets.config.HF_HUB_OFFLINE
    message = refusal("datasets:nobody/nothing:train")
    assert "it cannot be loaded (" in message
    assert message.endswith("; download it first, or set model.local_files_only to false")
    assert looked_up == [] and before == datasets.config.HF_HUB_OFFLINE


def test_a_data_set_in_the_cache_is_read_without_a_look_at_the_network(tmp_path: Path, looked_up: list[Any]):
    source = as_jsonl_directory(tmp_path, ITEMS).removeprefix("datasets:")
    datasets.load_dataset(source, cache_dir=tmp_path / "made")
    (made,) = (path.parent for path in (tmp_path / "made").rglob("*.arrow"))
    cached = tmp_path / "cache" / "owner___name" / "default" / "0.0.0" / ("a" * 40)
    cached.parent.mkdir(parents=True)
    made.rename(cached)
    (cached / "j-train.arrow").rename(cached / "name-train.arrow")
    for reference in ("datasets:owner/name:train", "datasets:owner/name"):
        assert load(reference).texts == tuple(item["prompt"] for item in ITEMS)
    assert "no split 'test'; name one of those there: train" in refusal("datasets:owner/name:test")
    assert looked_up == []


def test_code_that_comes_with_a_data_set_is_never_run(tmp_path: Path):
    source = as_parquet_directory(tmp_path, ITEMS)
    (tmp_path / "d" / "d.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert "Dataset scripts are no longer supported" in refusal(source)
    assert not (tmp_path / "ran").exists()


def test_files_of_different_schemas_end_in_one_line(tmp_path: Path):
    source = as_jsonl_directory(tmp_path, [{"prompt": "a"}])
    write_jsonl(tmp_path / "j" / "tail.jsonl", [{"other": SECRET}])
    message = refusal(source)
    assert message.startswith((f"{source}:2: prompt: null", f"data.prompts: got {source!r}; cannot be read to its end"))


@pytest.mark.parametrize(("source", "module"), [("p.parquet", "pyarrow.parquet"), ("datasets:a/b:train", "datasets")])
def test_a_missing_extra_is_named_with_what_installs_it(source: str, module: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, module, None)
    message = refusal(source, error=ConfigError)
    assert message.startswith(f"data.prompts: got {source!r}; ")
    how = "in the working copy of ray_probe: pip install -e '.[datasets]'"
    assert message.endswith(f"needs the package {module.split('.')[0]}; {how}")


# What is left alone


def test_progress_bars_are_as_they_were(tmp_path: Path):
    source = as_saved(tmp_path, ITEMS)
    for setting in (datasets.enable_progress_bars, datasets.disable_progress_bars):
        setting()
        before = datasets.are_progress_bars_disabled()
        load(source)
        assert datasets.are_progress_bars_disabled() == before


@pytest.mark.parametrize("write", [as_saved_splits, as_parquet_directory, as_jsonl_directory])
def test_local_files_are_read_where_they_lie(tmp_path: Path, write: Writer):
    load(write(tmp_path, ITEMS))
    assert not (tmp_path / "cache").exists()


def test_a_relative_source_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    as_saved_splits(tmp_path, ITEMS)
    monkeypatch.chdir(tmp_path)
    assert absolute_source("datasets:splits:test") == f"datasets:{tmp_path / 'splits'}:test"
    assert absolute_source("datasets:splits") == f"datasets:{tmp_path / 'splits'}"
    assert absolute_source("datasets:owner/name:main:train") == "datasets:owner/name:main:train"
    assert absolute_source("p.parquet") == str(tmp_path / "p.parquet")


def test_rows_come_one_at_a_time(tmp_path: Path):
    rows = rows_of_jsonl(Path(as_jsonl(tmp_path, [*ITEMS, {"prompt": "c", "id": True}])), "p", "prompt")
    assert [next(rows).value for _ in ITEMS] == [item["prompt"] for item in ITEMS]
