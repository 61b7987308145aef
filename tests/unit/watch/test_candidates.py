"""Which directories below an output directory are checkpoints."""

import itertools
from pathlib import Path

import pytest
from support.trainer_scripts import SCRIPTS

from ray_probe.watch.candidates import checkpoints


def listed(root: Path) -> list[tuple[str, int | None]]:
    return [(str(Path(found.key).relative_to(root)), found.step) for found in checkpoints(root)]


def test_checkpoints_come_by_step_and_not_by_name(tmp_path: Path) -> None:
    for name in ("checkpoint-1000", "checkpoint-20", "checkpoint-3", "runs/Nov29_10-00-00"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "config.json").write_text("{}")
    assert listed(tmp_path) == [("checkpoint-3", 3), ("checkpoint-20", 20), ("checkpoint-1000", 1000), ("final", None)]


def test_a_directory_without_a_known_name_counts_once_it_has_a_file_of_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "hf" / "17").mkdir(parents=True)
    assert listed(tmp_path) == []
    (tmp_path / "hf" / "17" / "config.json").write_text("{}")
    assert listed(tmp_path) == [("hf/17", 17)]


def test_hidden_directories_critics_and_links_to_a_checkpoint_are_left_out(tmp_path: Path) -> None:
    for name in (".ray_probe/pins/checkpoint-4", "checkpoint-5/global_step5", "_critic/global_step5"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "latest").symlink_to(tmp_path / "checkpoint-5")
    assert listed(tmp_path) == [("checkpoint-5", 5)]


def test_what_lies_deeper_than_three_levels_is_not_looked_for(tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "a" / "b" / "checkpoint-6").mkdir()
    assert listed(tmp_path) == [("a/b/checkpoint-6", 6)]


@pytest.mark.parametrize("names", [
    names for length in (1, 2) for names in itertools.combinations(("tmp_step_5", "old_step_5", "step_5"), length)
])  # fmt: skip
def test_a_step_that_is_saved_twice_is_one_checkpoint(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).mkdir()
    assert listed(tmp_path) == [("step_5", 5)]


def test_a_directory_that_is_not_there_has_no_checkpoints(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_checkpoint_of_each_trainer_is_listed_alone(name: str, tmp_path: Path) -> None:
    for phase in SCRIPTS[name].phases:
        for write in phase:
            for step in write.steps():
                step(tmp_path)
    assert listed(tmp_path) == [(SCRIPTS[name].directory, 5)]
