"""The README is short, its example loads, and its table is that of a run."""

import re
from pathlib import Path

import pytest
from support.pages import README, page
from typer.testing import CliRunner

from ray_probe.cli.main import app
from ray_probe.config import load_config

PAGE = page(README)
IN_ORDER = [
    "ray_probe", "Run it", "Your own checkpoint", "Reading the table", "Comparing two checkpoints", "From a trainer",
    "Guarantees", "Limits", "Read on",
]  # fmt: skip


def test_it_has_at_most_150_lines_in_the_order_of_a_users_hour() -> None:
    assert len(PAGE.text.splitlines()) <= 150
    assert PAGE.headings() == IN_ORDER


def test_guarantees_and_limits_are_five_each_and_the_examples_of_a_trainer_six_lines() -> None:
    for heading in ("Guarantees", "Limits"):
        assert len(re.findall(r"^- ", PAGE.section(heading), re.MULTILINE)) == 5
    examples = re.findall(r"```(?:sh|python)\n(.*?)```", PAGE.section("From a trainer"), re.DOTALL)
    assert [len([line for line in text.splitlines() if line]) for text in examples] == [6, 5]


def test_the_example_is_a_configuration(tmp_path: Path) -> None:
    (example,) = PAGE.blocks("yaml")
    (tmp_path / "mine.yaml").write_text(example)
    batch = load_config(tmp_path / "mine.yaml").batch
    assert batch.rounds is not None and batch.rounds * batch.prompts_per_round * batch.responses_per_prompt == 128


@pytest.mark.parametrize("row", ["Verdict", "Entropy +per sequence", "per token", "Gradient", "snr", "Wrong", "To do"])
def test_its_table_has_the_rows_that_a_run_prints(run_directory: Path, row: str) -> None:
    printed = CliRunner().invoke(app, ["results", str(run_directory)], catch_exceptions=False).stdout
    assert re.search(rf"^ *{row}\b", PAGE.blocks("")[0], re.MULTILINE)
    assert re.search(rf"^ *{row}\b", printed, re.MULTILINE), printed
