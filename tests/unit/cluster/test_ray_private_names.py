"""Private names of Ray stand in one file, each with what would replace it."""

import ast
import re
from pathlib import Path

import pytest

import ray_probe
from ray_probe.cluster.head import ray_private

PACKAGE = Path(ray_probe.__file__).parent
CONTRACTS = Path(__file__).parents[2] / "integration" / "test_ray_private.py"
HOME = PACKAGE / "cluster" / "head" / "ray_private.py"
PRIVATE = re.compile(
    r"\bray\._(?!_)|\b_raylet\b|\"_temp_dir|RAY_[a-z]|node:__internal|ray_current_cluster|RAY_ENABLE_(?!K8S)|RAY_DEFAULT_"
)


def test_no_other_file_has_a_private_name_of_ray() -> None:
    found = {
        f"{path.relative_to(PACKAGE)}:{number}"
        for path in PACKAGE.rglob("*.py")
        if path != HOME
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
        if PRIVATE.search(line)
    }
    assert found == set()


def test_every_name_says_what_would_replace_it() -> None:
    body = ast.parse(HOME.read_text(encoding="utf-8")).body
    constants = [node for node in body if isinstance(node, ast.Assign)]
    assert len(constants) >= 9
    for node in constants:
        said = body[body.index(node) + 1]
        assert isinstance(said, ast.Expr) and "Replaced by:" in ast.unparse(said), ast.unparse(node)
    for function in (node for node in body if isinstance(node, ast.FunctionDef)):
        text = ast.get_docstring(function) or ""
        assert "Replaced by:" in text or "see `JOB_VARIABLE`" in text, function.name


def test_every_name_has_a_contract_test() -> None:
    body = ast.parse(HOME.read_text(encoding="utf-8")).body
    constants = [ast.unparse(node.targets[0]) for node in body if isinstance(node, ast.Assign)]
    functions = [node.name for node in body if isinstance(node, ast.FunctionDef)]
    tested = set(re.findall(r"\bray_private\.(\w+)", CONTRACTS.read_text(encoding="utf-8")))
    assert tested == {*constants, *functions}


def test_without_a_job_there_is_no_working_dir_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ray_private.JOB_VARIABLE, "not JSON")
    assert ray_private.submitted_working_dir() is None
    monkeypatch.setenv(ray_private.JOB_VARIABLE, '{"runtime_env": {"working_dir": "gcs://a.zip"}}')
    assert ray_private.submitted_working_dir() == "gcs://a.zip"
    monkeypatch.delenv(ray_private.JOB_VARIABLE)
    assert ray_private.submitted_working_dir() is None
