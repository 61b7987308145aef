"""Only unlocked directories of this user are removed from /tmp."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ray_probe.cluster.head.environment import PREFIX, private_dir
from ray_probe.cluster.head.stale_dirs import LOCK, in_use, remove_leftovers


def left(parent: Path, name: str = f"{PREFIX}left") -> Path:
    """What a process that was killed has left."""
    path = parent / name
    path.mkdir(mode=0o700)
    with in_use(path):
        (path / "r").mkdir()
        (path / "token").write_text("secret")
    return path


def test_what_a_killed_process_has_left_is_removed_and_what_a_live_one_uses_stays(tmp_path: Path) -> None:
    use = (
        "import sys, time, tempfile; tempfile.tempdir = sys.argv[1]\n"
        "from ray_probe.cluster.head import environment\n"
        "environment.MAX_TMP_CHARS = 1000\n"
        "with environment.private_dir() as path: print(path, flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", use, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert path.parent == tmp_path and path.stat().st_mode & 0o777 == 0o700
        assert remove_leftovers(tmp_path, PREFIX) == [] and (path / "token").exists()
        process.kill()
        process.wait(30)
    assert remove_leftovers(tmp_path, PREFIX) == [path] and not path.exists()


def test_the_next_start_removes_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("ray_probe.cluster.head.environment.MAX_TMP_CHARS", 1000)
    path = left(tmp_path)
    with private_dir() as mine:
        assert not path.exists()
        assert remove_leftovers(tmp_path, PREFIX) == [] and Path(mine, LOCK).exists()
    assert list(tmp_path.iterdir()) == []


def others(parent: Path) -> dict[str, Path]:
    """What looks like a leftover and is none."""
    outside = left(parent, "outside")
    (parent / f"{PREFIX}link").symlink_to(outside)
    open_to_all = left(parent, f"{PREFIX}open")
    open_to_all.chmod(0o755)
    (unlocked := parent / f"{PREFIX}unlocked").mkdir(mode=0o700)
    (linked := parent / f"{PREFIX}linked").mkdir(mode=0o700)
    (linked / LOCK).symlink_to(outside / LOCK)
    (parent / f"{PREFIX}file").write_text("")
    return {path.name: path for path in (outside, parent / f"{PREFIX}link", open_to_all, unlocked, linked)}


def test_links_and_directories_of_others_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = others(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert remove_leftovers(tmp_path, PREFIX) == []
    assert sorted(tmp_path.rglob("*")) == before and there["outside"].is_dir()
    path = left(tmp_path, f"{PREFIX}another-users")
    with monkeypatch.context() as another:
        another.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
        assert remove_leftovers(tmp_path, PREFIX) == []
    assert remove_leftovers(tmp_path, PREFIX) == [path]


def test_a_link_in_what_is_removed_is_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("mine")
    path = left(tmp_path)
    (path / "r" / "link").symlink_to(kept)
    assert remove_leftovers(tmp_path, PREFIX) == [path]
    assert (kept / "file").read_text() == "mine"
