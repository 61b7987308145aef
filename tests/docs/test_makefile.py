"""`make run` says what it installs and how long that took, and installs once."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
STUB = """#!/bin/sh
echo "python $*"
"""


def made(directory: Path) -> str:
    command = ["make", "-C", str(directory), "run", f"PYTHON={sys.executable}"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_first_call_says_what_it_does_and_the_second_goes_on_at_once(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    stub = tmp_path / ".venv" / "bin" / "python"
    stub.parent.mkdir(parents=True)
    stub.write_text(STUB)
    stub.chmod(0o755)
    first = made(tmp_path)
    for words in ("Installing torch, transformers, Ray", "2.4 GB", "minutes", "pip install -c", "Installed in 0 min;"):
        assert words in first
    assert "pip install -q" not in first
    assert "python launch.py run configs/tiny.yaml" in first
    second = made(tmp_path)
    assert "Install" not in second and "pip" not in second and "python launch.py run configs/tiny.yaml" in second
