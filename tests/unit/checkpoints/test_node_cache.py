"""A node has one whole copy of a checkpoint, made once, and does not fill up."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from support.adapters import write_adapter
from support.models import save_checkpoint, tiny_llama

from ray_probe.checkpoints import node_cache
from ray_probe.checkpoints.files import ADAPTER_FILES, CHECKPOINT_FILES
from ray_probe.checkpoints.fingerprint import adapter_fingerprint, fingerprint
from ray_probe.checkpoints.load import load_model
from ray_probe.checkpoints.node_cache import node_copy
from ray_probe.errors import CheckpointError, OutputError


class Source(NamedTuple):
    directory: Path
    digest: str


def small(directory: Path, text: str) -> Source:
    """A directory that passes for a checkpoint where nothing is loaded."""
    directory.mkdir()
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_text(text * 100)
    (directory / "optimizer.pt").write_text("not wanted")
    return Source(directory, fingerprint(directory))


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    return [small(tmp_path / f"c{n}", f"weights {n}") for n in range(5)]


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "node" / "cache"


def used_and_released(cache: Path, *sources: Source) -> None:
    for age, source in enumerate(sources):
        node_copy(str(cache), *source).release()
        os.utime(cache / source.digest, (1000 + age, 1000 + age))


def entries(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.is_dir()}


def test_without_a_cache_the_originals_are_used(sources: list[Source], tmp_path: Path):
    copy = node_copy(None, *sources[0], tmp_path)
    assert (copy.directory, copy.adapter) == (sources[0].directory, tmp_path)
    copy.release()


def test_what_is_loaded_from_the_copy_is_the_checkpoint_and_its_adapter(tmp_path: Path, cache: Path):
    checkpoint = save_checkpoint(tmp_path / "c", tiny_llama(8), "abcdef")
    adapter = write_adapter(tmp_path / "a", checkpoint)
    (checkpoint / "optimizer.pt").write_text("not wanted")
    digests = fingerprint(checkpoint), adapter_fingerprint(adapter)
    copy = node_copy(str(cache), checkpoint, digests[0], adapter, digests[1])
    assert (copy.directory, copy.adapter) == (cache / digests[0], cache / digests[1])
    assert copy.adapter is not None
    assert fingerprint(copy.directory, CHECKPOINT_FILES) == digests[0]
    assert fingerprint(copy.adapter, ADAPTER_FILES) == digests[1]
    assert not (copy.directory / "optimizer.pt").exists()
    shutil.rmtree(checkpoint)
    assert load_model(copy.directory, "float32").config.vocab_size == 8


def test_a_copy_is_made_once(sources: list[Source], cache: Path, monkeypatch: pytest.MonkeyPatch):
    node_copy(str(cache), *sources[0]).release()
    shutil.rmtree(sources[0].directory)
    assert node_copy(str(cache), *sources[0]).directory == cache / sources[0].digest


PROCESS = """
import json, pathlib, sys, time
from ray_probe.checkpoints import node_cache
cache, source, digest, ready, processes, own = sys.argv[1:]
copied, copy_file = [], node_cache.shutil.copyfile
def wait_for_others():
    while len(list(pathlib.Path(ready).iterdir())) < int(processes):
        time.sleep(0.01)
def counted(source, target):
    copied.append(source.name)
    time.sleep(0.2)
    copy_file(source, target)
node_cache.shutil.copyfile = counted
(pathlib.Path(ready) / own).touch()
wait_for_others()
copy = node_cache.node_copy(cache, pathlib.Path(source), digest)
print(json.dumps([copied, (copy.directory / "model.safetensors").read_text()]))
"""


def test_several_processes_at_once_copy_once(sources: list[Source], cache: Path, tmp_path: Path):
    (tmp_path / "ready").mkdir()
    arguments = [str(cache), str(sources[0].directory), sources[0].digest, str(tmp_path / "ready"), "3"]
    processes = [
        subprocess.Popen([sys.executable, "-c", PROCESS, *arguments, str(n)], stdout=subprocess.PIPE, text=True)
        for n in range(3)
    ]
    answers = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert sorted(name for copied, _ in answers for name in copied) == ["config.json", "model.safetensors"]
    assert {text for _, text in answers} == {"weights 0" * 100}
    assert entries(cache) == {sources[0].digest}


@pytest.mark.parametrize("what", ["cut", "changed", "missing", "more"])
def test_a_damaged_copy_is_made_again(sources: list[Source], cache: Path, what: str):
    node_copy(str(cache), *sources[0]).release()
    file = cache / sources[0].digest / "model.safetensors"
    if what == "cut":
        os.truncate(file, 10)
    elif what == "changed":
        file.write_text("weights 1" * 100)
    elif what == "missing":
        file.unlink()
    else:
        file.with_name("tokenizer.json").write_text("{}")
    copy = node_copy(str(cache), *sources[0])
    assert fingerprint(copy.directory) == sources[0].digest
    assert entries(cache) == {sources[0].digest}


def test_what_a_crash_left_of_a_copy_is_done_again(sources: list[Source], cache: Path):
    for name in (sources[0].digest, sources[1].digest):
        (cache / f"{name}.part").mkdir(parents=True)
        (cache / f"{name}.part" / "model.safetensors").write_text("half")
    copy = node_copy(str(cache), *sources[0])
    assert (copy.directory / "model.safetensors").read_text() == "weights 0" * 100
    assert entries(cache) == {sources[0].digest}


def test_a_copy_that_breaks_off_leaves_nothing(sources: list[Source], cache: Path, monkeypatch: pytest.MonkeyPatch):
    def full(source: Path, target: Path) -> None:
        target.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(node_cache.shutil, "copyfile", full)
        with pytest.raises(
            OutputError, match=r"^model\.cache_dir: got .*No space left on device.*set it to null"
        ) as caught:
            node_copy(str(cache), *sources[0])
    assert "\n" not in str(caught.value)
    assert entries(cache) == set()
    assert fingerprint(node_copy(str(cache), *sources[0]).directory) == sources[0].digest


def test_a_directory_that_cannot_be_made_is_named(sources: list[Source], tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"^model\.cache_dir: got .*file/cache"):
        node_copy(str(tmp_path / "file" / "cache"), *sources[0])


def test_an_original_that_is_not_what_the_run_measures_is_refused(sources: list[Source], cache: Path):
    (sources[0].directory / "model.safetensors").write_text("overwritten")
    with pytest.raises(CheckpointError, match=r"^model\.path: .*not what the run measures"):
        node_copy(str(cache), *sources[0])
    adapter = sources[1].directory
    with pytest.raises(CheckpointError, match=r"^model\.adapter: "):
        node_copy(str(cache), *sources[2], adapter, "0" * 64)


def test_the_two_used_last_are_kept_and_older_ones_go(sources: list[Source], cache: Path):
    used_and_released(cache, *sources[:3])
    assert entries(cache) == {source.digest for source in sources[:3]}, "two others beside the one that is made"
    used_and_released(cache, sources[0])  # used again: now the newest
    os.utime(cache / sources[0].digest)
    node_copy(str(cache), *sources[3]).release()
    assert entries(cache) == {sources[n].digest for n in (0, 2, 3)}


def test_an_entry_in_use_stays(sources: list[Source], cache: Path):
    held = node_copy(str(cache), *sources[0])
    os.utime(held.directory, (1, 1))
    used_and_released(cache, *sources[1:])
    assert (held.directory / "model.safetensors").exists()
    held.release()
    used_and_released(cache, *sources[1:3])
    node_copy(str(cache), *small(cache.parent / "another", "new"))
    assert not held.directory.exists()


def test_where_the_disk_is_too_full_unused_entries_go_and_else_the_numbers_are_named(
    sources: list[Source], cache: Path, monkeypatch: pytest.MonkeyPatch
):
    used_and_released(cache, *sources[:2])
    held = node_copy(str(cache), *sources[2])

    def usage(path: Path) -> Any:
        return type("Usage", (), {"free": 10_000 if len(entries(cache)) <= 1 else 10})

    monkeypatch.setattr(node_cache.shutil, "disk_usage", usage)
    copy = node_copy(str(cache), *sources[3])
    assert entries(cache) == {held.directory.name, copy.directory.name}
    with pytest.raises(OutputError, match=r"^model\.cache_dir: .*0\.00 GB are needed and 0\.00 GB are free"):
        node_copy(str(cache), *sources[4])


def test_the_cache_is_for_its_owner_alone(sources: list[Source], cache: Path):
    node_copy(str(cache), *sources[0])
    assert cache.stat().st_mode & 0o777 == 0o700
    assert (cache / sources[0].digest).stat().st_mode & 0o777 == 0o700


def test_locks_are_let_go_whatever_happens(sources: list[Source], cache: Path):
    before = len(os.listdir("/proc/self/fd"))
    node_copy(str(cache), *sources[0]).release()
    with pytest.raises(CheckpointError):
        node_copy(str(cache), *sources[1], sources[2].directory, "0" * 64)
    assert len(os.listdir("/proc/self/fd")) == before
