"""Sharded checkpoints that the user's command converts: one at a time, once each, failures said."""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.trainer_scripts import SCRIPTS
from support.trainers import Write
from support.watching import FakeService, Watch, saved

from ray_probe.errors import ConfigError
from ray_probe.system.clock import wait_until
from ray_probe.watch.conversion import Converter, Process, split, words_of

TEMPLATE = "convert {src} --to {dst}"


class Command:
    """A conversion that a test ends."""

    def __init__(self, words: Sequence[str], log: Path) -> None:
        self.words, self.code, self.ended = list(words), None, False  # type: ignore[var-annotated]

    def poll(self) -> int | None:
        return self.code

    def last_line(self) -> str:
        return "ValueError: no such rank"

    def end(self) -> None:
        self.ended = True

    def succeed(self) -> None:
        to = Path(self.words[-1])
        saved(to.parent, int(to.name.split("_")[2]), to.name)
        self.code = 0


@pytest.fixture
def commands() -> list[Command]:
    return []


@pytest.fixture
def watch(tmp_path: Path, commands: list[Command]) -> Watch:
    return watch_with(tmp_path, commands)


def watch_with(tmp_path: Path, commands: list[Command], service: FakeService | None = None) -> Watch:
    def start(words: Sequence[str], log: Path) -> Command:
        commands.append(Command(words, log))
        return commands[-1]

    return Watch(tmp_path, service, converter=lambda own: Converter(own, TEMPLATE, None, start))


def sharded(root: Path, step: int = 5) -> Path:
    """Writes a finished checkpoint of verl with shards of FSDP."""
    for phase in SCRIPTS["verl"].phases:
        for write in phase:
            for one in Write(write.path.replace("step_5", f"step_{step}"), write.data).steps():
                one(root)
    (root / "latest_checkpointed_iteration.txt").write_text("99")
    return root / f"global_step_{step}"


def test_without_a_command_the_one_to_call_is_said(tmp_path: Path) -> None:
    watch = Watch(tmp_path)
    directory = sharded(watch.root)
    assert watch.step() == {"global_step_5": "needs conversion"}
    assert watch.whys()["global_step_5"].split() == [
        "python", "-m", "verl.model_merger", "merge", "--backend", "fsdp", "--local_dir", str(directory / "actor"),
        "--target_dir", str(directory) + "_hf",
    ]  # fmt: skip


def test_a_converted_checkpoint_is_measured_under_its_own_name_and_step(watch: Watch, commands: list[Command]) -> None:
    directory = sharded(watch.root)
    assert watch.step() == {"global_step_5": "waiting"} and watch.whys()["global_step_5"] == "its conversion"
    shutil.rmtree(directory)
    assert sorted(path.name for path in Path(commands[0].words[1]).glob("*.pt"))[0].startswith("extra_state")
    assert not watch.watcher.settled()
    commands[0].succeed()
    watch.step()
    assert watch.states["global_step_5"] == "queued" and watch.service.asked["m0001"]["settings"]["series.step"] == 5
    watch.service.end_all()
    watch.step()
    assert watch.states["global_step_5"] == "measured" and watch.pins == ["global_step_5_hf"]


def test_one_checkpoint_is_converted_at_a_time_and_a_restart_converts_none_twice(
    watch: Watch, tmp_path: Path, commands: list[Command]
) -> None:
    for step in (5, 6):
        sharded(watch.root, step)
    watch.step()
    assert watch.whys()["global_step_6"] == "the conversion of another checkpoint" and len(commands) == 1
    commands[0].succeed()
    watch.step()
    watch.step()
    assert watch.states["global_step_5"] == "queued" and len(commands) == 2
    watch.watcher.close()
    assert commands[1].ended and watch.pins == ["global_step_5_hf"]
    again: list[Command] = []
    restarted = watch_with(tmp_path, again, watch.service)
    assert restarted.step() == {"global_step_5": "queued", "global_step_6": "waiting"}
    again[0].succeed()
    restarted.step()
    assert len(again) == 1 and restarted.asked()[1:] == [
        ("global_step_6_hf", "global_step_5_hf"), ("global_step_6_hf", None)
    ]  # fmt: skip


@pytest.mark.parametrize("leaves_nothing", [True, False])
def test_a_conversion_that_fails_is_said_and_not_tried_for_ever(
    watch: Watch, commands: list[Command], leaves_nothing: bool
) -> None:
    sharded(watch.root)
    watch.step()
    if not leaves_nothing:
        Path(commands[0].words[-1]).mkdir()
    commands[0].code = 1 if leaves_nothing else 0
    watch.step()
    assert watch.step() == {"global_step_5": "needs conversion"} and len(commands) == 1
    said = "ended with 1: ValueError: no such rank" if leaves_nothing else "left no whole model: config.json"
    assert said in watch.whys()["global_step_5"] and watch.pins == []


def test_a_command_runs_without_a_shell_and_its_last_line_is_kept(tmp_path: Path) -> None:
    script = "import sys; print('begun'); print('the last; $HOME'); sys.exit(3)"
    process = Process([sys.executable, "-c", script], tmp_path / "log")
    assert wait_until(process.poll, 30.0, done=lambda code: code is not None) == 3
    assert process.last_line() == "the last; $HOME"
    missing = Process([str(tmp_path / "none")], tmp_path / "log")
    assert missing.poll() == 127 and "No such file" in missing.last_line()


def test_a_command_that_runs_is_ended(tmp_path: Path) -> None:
    process = Process([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    assert process.poll() is None
    process.end()
    assert process.poll() not in (None, 0)


def test_words_keep_paths_with_blanks_whole() -> None:
    assert words_of("a --x={src} '{dst} b'", Path("/p q"), Path("/r s")) == ["a", "--x=/p q", "/r s b"]


@pytest.mark.parametrize("template", ["convert {src}", "convert {dst}", "", "convert {src} '{dst}"])
def test_a_template_without_both_places_is_refused(template: str) -> None:
    with pytest.raises(ConfigError, match=r"^--convert: got "):
        split(template)
