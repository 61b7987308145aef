"""`pip install .` installs the package and no tests, benchmarks or docs."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from support.pages import ROOT

DATA = {".py", ".typed", ".json", ".html", ".js", ".css", ".txt"}


def test_the_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("ray_probe", "tests", "benchmarks", "configs", "deploy", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.safetensors"))
    for name in ("pyproject.toml", "README.md", "launch.py"):
        shutil.copy(ROOT / name, copy)
    build = "import os; from setuptools import build_meta; print(build_meta.build_wheel(os.environ['WHEELS']))"
    command = [sys.executable, "-c", build]
    done = subprocess.run(
        command, cwd=copy, env={"PATH": "/usr/bin:/bin", "WHEELS": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = [path for path in (ROOT / "ray_probe").rglob("*") if path.suffix in DATA]
    assert names == {str(path.relative_to(ROOT)) for path in package}
