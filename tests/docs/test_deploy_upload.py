"""`ray job submit` sends code and prompts, and nothing heavy or private."""

import shutil
import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package
from support.deployment import ROOT

MB = 10**6
LEFT_BEHIND = [
    ".git/objects/pack/pack-1.pack",
    ".venv/lib/python3.11/site-packages/torch/lib.so",
    ".hypothesis/examples/1",
    "runs/tiny-1/state/gradient.bin",
    "runs/tiny-1/ledger.jsonl",
    "checkpoints/step-400/model.safetensors",
    "checkpoints/step-400/model-00001-of-00002.safetensors",
    "checkpoints/old/pytorch_model.bin",
    "ray_probe/__pycache__/cli.cpython-311.pyc",
]


def sent(working_copy: Path, package: Path) -> set[str]:
    """Returns the names of the files that Ray packs by .rayignore alone."""
    create_package(str(working_copy), package, include_gitignore=False, excludes=[])
    return {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}


def test_a_working_copy_travels_without_weights_runs_and_hidden_files(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for name in ("ray_probe", "configs", "deploy", "docs", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in (".rayignore", "launch.py", "README.md", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, copy)
    for name in LEFT_BEHIND:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(b"0" * MB)
    names = sent(copy, tmp_path / "sent.zip")
    assert {"launch.py", "ray_probe/cli/main.py", "configs/cluster_1p5b.yaml", "configs/prompts/tiny.jsonl"} <= names
    assert names.isdisjoint(LEFT_BEHIND)
    assert [name for name in names if name.endswith(".safetensors") or name.startswith((".", "docs/", "tests/"))] == []
    assert (tmp_path / "sent.zip").stat().st_size < 2 * MB, "Ray packs without compressing: the code alone takes 1 MB"
