"""docs/results.md describes every field, every file and every exit code."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.pages import ROOT, page

from ray_probe import errors
from ray_probe.checkpoints.tokenizer.eos import Eos
from ray_probe.core.estimator.baselines import MODES
from ray_probe.run.comparison.change import Change

PAGE = page("docs/results.md")
FIELDS = set(re.findall(r"^\| `([\w.]+)` \|", PAGE.section("result.json"), re.MULTILINE))
SCHEMA = ROOT / "ray_probe" / "run" / "result.schema.json"
WHOLE = {"config"}
"""Described on a page of its own."""


def fields(value: Any, path: str = "") -> Iterator[str]:
    """Yields dotted paths of all fields, without keys that are modes."""
    if not isinstance(value, dict) or not value or path in WHOLE or set(value) == set(MODES) or path.count(".") == 1:
        yield path
        return
    for name, inner in value.items():
        yield from fields(inner, f"{path}.{name}" if path else name)


def test_every_field_of_a_result_is_described_and_no_other(run_directory: Path) -> None:
    result = json.loads((run_directory / "result.json").read_text())
    assert "eos" not in result, "this run has no EOS ids of its own"
    result["eos"] = Eos((1,), "config.json", {"tokenizer": (2,)}, {"1": "a", "2": "b"}).to_json()
    assert "change" not in result, "this run is no comparison"
    result["change"] = Change().to_json()
    assert set(fields(result)) == FIELDS


@pytest.mark.parametrize("name", ["value", "se", "interval", "mode", "against", "difference"])
def test_what_is_inside_of_a_figure_by_mode_is_named(run_directory: Path, name: str) -> None:
    result = json.loads((run_directory / "result.json").read_text())
    inside = {*result["advantage_mean_square_ratio"]["regression"], *result["advantage_paired"][0]}
    assert name in inside == {"value", "se", "interval", "mode", "against", "difference"}
    assert re.search(rf"`{{[^}}]*\b{name}\b[^}}]*}}`", PAGE.section("result.json"))


def test_every_field_of_the_schema_is_described() -> None:
    assert f"../{SCHEMA.relative_to(ROOT)}" in PAGE.links()
    properties = json.loads(SCHEMA.read_text())["properties"]
    assert set(properties) <= {field.split(".")[0] for field in FIELDS}


def test_every_file_of_a_run_directory_is_described(run_directory: Path) -> None:
    section = PAGE.section("The run directory")
    described = {name.rstrip("/") for name in re.findall(r"^\| `([\w.*/]+)` \|", section, re.MULTILINE)}
    found = {path.name for path in run_directory.iterdir() if path.suffix != ".png"}
    assert {"result.json", "rounds.jsonl", "state"} <= found <= described


def test_every_exit_code_is_described() -> None:
    table = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE.section("Exit codes"), re.MULTILINE)}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ProbeError)]
    assert {kind.exit_code for kind in kinds} | {0, 1, 3, 130} == table
