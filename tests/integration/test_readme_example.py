"""The README's first example for one's own checkpoint, as it stands, where stdout takes ASCII alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
ASCII_ONLY = {"PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def command(home: Path, *arguments: object) -> "subprocess.CompletedProcess[bytes]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = kept | {"HOME": str(home), "XDG_STATE_HOME": str(home / "state")} | ASCII_ONLY
    line = [sys.executable, str(ROOT / "launch.py"), *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, timeout=240, check=False)


def test_it_runs_and_a_finished_run_is_shown_again(tmp_path: Path) -> None:
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Your own checkpoint")[1]
    first = re.findall(r"```yaml\n(# mine\.yaml\n.*?)```", section, re.DOTALL)[0]
    (tmp_path / "mine.yaml").write_text(first)
    done = command(tmp_path, "run", tmp_path / "mine.yaml", "--out", tmp_path / "runs")
    table = done.stdout.decode("ascii")
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    entropy = result["entropy"]
    assert result["counts"]["sequences"] == 128 and not result["partial"]
    assert f"{entropy['per_sequence']:.2f} +- {entropy['per_sequence_se']:.2f} nats" in table
    assert f"results, plots and log: {run}\n" in table
    assert len(table.splitlines()) <= 22 and "\nVerdict" in table

    again = command(tmp_path, "results", run)
    assert (again.returncode, again.stdout) == (0, done.stdout)
