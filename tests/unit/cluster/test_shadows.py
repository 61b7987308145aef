"""A file that would be imported instead of a library is refused by its name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_probe.cluster.connection.shadows import refuse_shadows, shadows
from ray_probe.cluster.head.ray_private import JOB_VARIABLE
from ray_probe.errors import ConfigError


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory that is not on this process's path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if Path(entry).resolve() != Path.cwd()])
    return tmp_path


@pytest.mark.parametrize("name", ["tokenizers.py", "torch.py", "numpy.py", "queue.py"])
def test_a_file_with_the_name_of_a_library_is_found(place: Path, name: str) -> None:
    assert shadows(place) == []
    (place / name).write_text("")
    assert shadows(place) == [name]
    assert shadows(place, ["*.txt", f"/{name}"]) == [], "Ray does not upload it"


def test_a_package_is_found_and_what_is_no_module_or_no_library_is_not(place: Path) -> None:
    for directory in ("tokenizers", "torch", "ray_probe", "mine"):
        (place / directory).mkdir()
    for package in ("tokenizers", "ray_probe", "mine"):
        (place / package / "__init__.py").write_text("")
    for file in ("train.py", "numpy.txt", "sys.py"):
        (place / file).write_text("")
    assert shadows(place) == ["tokenizers"]


def test_a_module_of_the_directory_alone_is_not_found_though_it_is_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "helpers_of_mine.py").write_text("")
    monkeypatch.syspath_prepend(str(place))
    import helpers_of_mine  # noqa: F401

    assert shadows(place) == []


def test_the_working_dir_of_a_runtime_env_is_looked_at(place: Path) -> None:
    uploaded = place / "uploaded"
    uploaded.mkdir()
    refuse_shadows({"working_dir": str(uploaded)})
    refuse_shadows({"working_dir": "s3://bucket/code.zip"})
    (uploaded / "tokenizers.py").write_text("")
    refuse_shadows({})
    refusal = r"^cluster\.runtime_env\.working_dir: got '.*uploaded'; tokenizers\.py: .*rename"
    with pytest.raises(ConfigError, match=refusal):
        refuse_shadows({"working_dir": str(uploaded)})
    with pytest.raises(ConfigError, match=r"tokenizers\.py"):
        refuse_shadows({"working_dir": "uploaded"})
    refuse_shadows({"working_dir": str(uploaded), "excludes": ["tokenizers.py"]})


def test_the_working_directory_is_looked_at_where_workers_or_this_process_import_from_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "tokenizers.py").write_text("")
    refuse_shadows({})
    with monkeypatch.context() as patch:
        patch.setenv(JOB_VARIABLE, json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}}))
        with pytest.raises(ConfigError, match=r"working_dir of the job: got 'gcs:.*'; tokenizers\.py: .*exclude"):
            refuse_shadows({})
        patch.setenv(JOB_VARIABLE, "{}")
        refuse_shadows({})
    monkeypatch.syspath_prepend("")
    with pytest.raises(ConfigError, match=r"working directory: got '.*'; tokenizers\.py: .*PYTHONPATH"):
        refuse_shadows({})


@pytest.mark.parametrize("name", ["tokenizers.py", "numpy.py"])
def test_a_run_with_an_empty_entry_in_pythonpath_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("raise ImportError('the wrong one')")
    (tmp_path / "run.yaml").write_text("model: {path: nowhere}\ndata: {prompts: [a]}\n")
    root = str(Path(__file__).parents[3])
    done = subprocess.run(
        [sys.executable, "-c", "from ray_probe.cli.main import main; main()", "run", "run.yaml"],
        cwd=tmp_path, timeout=60,
        env=os.environ | {"PYTHONPATH": f"{root}:"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: working directory: got '{tmp_path}'; {name}: Python imports it")
