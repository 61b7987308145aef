"""Every promise and every fault on docs/reliability.md names tests that are there."""

import ast
import re
from functools import cache

import pytest
from support.pages import ROOT, page

PAGE = page("docs/reliability.md")
ROWS = re.findall(r"^\| (?!promise|fault|---)(.+) \|$", PAGE.text, re.MULTILINE)
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE.text)))


@cache
def functions_of(path: str) -> set[str]:
    """Names of the test functions of a file, from its text."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize(("path", "name"), TESTS, ids=lambda part: part)
def test_a_test_that_is_named_is_there(path: str, name: str) -> None:
    assert name in functions_of(path)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split(" | ")[0][:60])
def test_every_row_names_a_test(row: str) -> None:
    assert "::" in row.split(" | ")[-1]


def test_there_are_many() -> None:
    assert len(ROWS) >= 50 and len(TESTS) >= 80
    assert {path for path, _ in TESTS} >= {f"tests/faults/{name}.py" for name in (
        "test_blame", "test_drivers", "test_fitter", "test_goes_on", "test_keepers", "test_killer", "test_rollouts",
        "test_round_work", "test_stuck", "test_writer",
    )}  # fmt: skip
