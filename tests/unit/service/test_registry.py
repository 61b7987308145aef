import json
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from ray_probe.errors import ConfigError
from ray_probe.service import registry
from ray_probe.service.registry import Entry
from ray_probe.system import processes


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The state directory of a user who has none yet."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "state"


@pytest.fixture
def process() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that lives until the test ends it."""
    started = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield started
    started.kill()
    started.communicate()


def an_entry(name: str = "demo", pid: int | None = None, **fields: Any) -> Entry:
    """An entry with everything in it; `pid` brings its time of creation along."""
    given: dict[str, Any] = {
        "name": name, "kind": "service", "address": "127.0.0.1:6379", "namespace": "ray_probe",
        "token_path": "/tmp/token", "loopback": True, "directory": f"/runs/{name}",
        "started": "2026-05-01T12:00:00+00:00", "pid": pid,
        "pid_created": None if pid is None else processes.created(pid),
    }  # fmt: skip
    return Entry(**(given | fields))


def names() -> list[str]:
    return [entry.name for entry in registry.entries()]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(params=[0o022, 0o000, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
def test_nobody_else_reads_or_writes_an_entry_whatever_the_umask(state: Path) -> None:
    registry.register(an_entry())
    assert mode(state / "ray_probe") == 0o700
    assert mode(state / "ray_probe" / "demo.json") == 0o600
    assert mode(state) & 0o022 == 0, "who may write here could put another directory in its place"
    assert [path.name for path in (state / "ray_probe").iterdir()] == ["demo.json"]


def test_a_directory_that_was_open_to_others_is_closed(state: Path) -> None:
    (state / "ray_probe").mkdir(parents=True)
    (state / "ray_probe").chmod(0o777)
    registry.register(an_entry())
    assert mode(state / "ray_probe") == 0o700


def test_entries_lie_in_the_home_directory_without_a_state_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for absent in ("", None):
        monkeypatch.delenv("XDG_STATE_HOME")
        if absent is not None:
            monkeypatch.setenv("XDG_STATE_HOME", absent)
        assert registry.place() == tmp_path / "home" / ".local" / "state" / "ray_probe"
        monkeypatch.setenv("XDG_STATE_HOME", "x")


def test_an_entry_comes_back_as_it_was_and_takes_the_place_of_an_earlier_one() -> None:
    first, second = an_entry(), an_entry(address="127.0.0.1:7000", token_path=None, kind="run")
    registry.register(first)
    assert registry.read("demo") == first
    registry.register(second)
    assert registry.entries() == [second]
    registry.unregister("demo")
    registry.unregister("demo")
    assert registry.read("demo") is None
    assert names() == []


def test_an_entry_lasts_as_long_as_its_block_however_that_ends() -> None:
    with pytest.raises(ZeroDivisionError), registry.registered(an_entry()):
        assert names() == ["demo"]
        raise ZeroDivisionError
    assert names() == []


@pytest.mark.parametrize("planted", ["demo.json", ".demo.PID"])
def test_a_symbolic_link_is_replaced_and_never_followed(state: Path, planted: str) -> None:
    target = state / "precious"
    (state / "ray_probe").mkdir(parents=True)
    target.write_text("untouched")
    (state / "ray_probe" / planted.replace("PID", str(os.getpid()))).symlink_to(target)
    registry.register(an_entry())
    assert target.read_text() == "untouched"
    assert not (state / "ray_probe" / "demo.json").is_symlink()
    assert registry.read("demo") == an_entry()


def test_what_an_earlier_process_left_open_to_others_is_not_written_into(state: Path) -> None:
    (state / "ray_probe").mkdir(parents=True)
    left = state / "ray_probe" / f".demo.{os.getpid()}"
    left.touch()
    left.chmod(0o666)
    registry.register(an_entry())
    assert mode(state / "ray_probe" / "demo.json") == 0o600


def test_an_entry_holds_where_the_token_lies_and_nothing_else_of_it(state: Path) -> None:
    registry.register(an_entry())
    assert json.loads((state / "ray_probe" / "demo.json").read_text()) == asdict(an_entry())
    assert [field for field in asdict(an_entry()) if "token" in field] == ["token_path"]


def test_a_state_directory_that_cannot_be_written_is_one_line_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"XDG_STATE_HOME: got .*cannot be written.*; set it to") as refused:
        registry.register(an_entry())
    assert "\n" not in str(refused.value)


def test_an_entry_is_live_as_long_as_its_process(process: "subprocess.Popen[bytes]") -> None:
    registry.register(an_entry(pid=process.pid))
    registry.register(an_entry("elsewhere"))
    assert names() == ["demo", "elsewhere"]
    process.kill()
    process.wait()
    assert names() == ["elsewhere"]
    stale = registry.read("demo")
    assert stale is not None
    assert stale.gone


def test_another_process_of_the_same_number_is_not_taken_for_it() -> None:
    mine = an_entry(pid=os.getpid())
    assert mine.pid_created is not None
    registry.register(mine)
    registry.register(replace(mine, name="earlier", pid_created=mine.pid_created - 1.0))
    registry.register(replace(mine, name="unknown", pid_created=None))
    assert names() == ["demo"]


def test_a_process_that_is_dead_and_not_reaped_is_gone(process: "subprocess.Popen[bytes]") -> None:
    entry = an_entry(pid=process.pid)
    assert not entry.gone
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE
    assert entry.gone


def test_a_clock_that_is_set_leaves_live_what_is_live(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reports a process's start as a time of day, which moves when the clock is set."""
    entry, boot = an_entry(pid=os.getpid()), psutil.boot_time()
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + 3600.0)
    assert psutil.Process().create_time() > boot + 3600.0
    assert not entry.gone


UNREADABLE = {
    "cut short": b'{"name": "bad", "ki',
    "not an object": b"[1, 2]",
    "empty": b"",
    "not text": b"\xff\xfe\x00",
    "of another version": json.dumps(asdict(an_entry("bad")) | {"shape": 2}).encode(),
    "with a field missing": b'{"name": "bad"}',
}


@pytest.mark.parametrize("damage", UNREADABLE)
def test_a_file_that_cannot_be_read_is_left_out_and_hides_no_other(state: Path, damage: str) -> None:
    registry.register(an_entry())
    (state / "ray_probe" / "bad.json").write_bytes(UNREADABLE[damage])
    (state / "ray_probe" / "directory.json").mkdir()
    (state / "ray_probe" / "dangling.json").symlink_to(state / "nowhere")
    assert names() == ["demo"]
    assert registry.read("bad") is None


def test_without_a_name_the_only_live_one_is_meant() -> None:
    registry.register(an_entry())
    registry.register(an_entry("stale", os.getpid(), pid_created=0.0))
    assert registry.choose(None).name == "demo"
    assert registry.choose("demo") == an_entry()


def test_with_nothing_up_the_remedy_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^--run: nothing is up; start a service: up CONFIG$"):
        registry.choose(None)
    with pytest.raises(ConfigError, match=r"^--run: got 'demo'; nothing of that name is up; there is nothing$"):
        registry.choose("demo")


def test_where_there_are_several_they_are_named() -> None:
    registry.register(an_entry("b"))
    registry.register(an_entry("a", kind="run"))
    with pytest.raises(ConfigError, match=r"^--run: there are a \(run\), b \(service\); choose one with --run NAME$"):
        registry.choose(None)
    with pytest.raises(ConfigError, match=r"^--run: got 'c'; nothing of that name is up; there is a \(run\), b \(serv"):
        registry.choose("c")
    assert registry.choose("a").kind == "run"


def test_a_run_beside_a_service_makes_neither_ambiguous_where_one_kind_is_meant() -> None:
    registry.register(an_entry("mine", kind="run"))
    with pytest.raises(ConfigError, match=r"^--run: no service is up; .*--run NAME chooses among mine \(run\)$"):
        registry.choose(None, "service")
    registry.register(an_entry())
    assert registry.choose(None, "service").name == "demo"
    assert registry.choose(None, "run").name == "mine"
    assert registry.choose("mine", "service").kind == "run", "a name says it all"
    registry.register(an_entry("second"))
    with pytest.raises(ConfigError, match=r"^--run: there are demo \(service\), second \(service\); choose one"):
        registry.choose(None, "service")


def files(state: Path) -> list[str]:
    return sorted(path.stem for path in (state / "ray_probe").iterdir())


def test_the_entry_of_a_killed_run_goes_when_entries_are_looked_at(state: Path) -> None:
    registry.register(an_entry())
    registry.register(an_entry("killed", os.getpid(), pid_created=0.0, kind="run"))
    assert files(state) == ["demo", "killed"]
    with pytest.raises(ConfigError, match="nothing of that name is up"):
        registry.choose("killed")
    assert files(state) == ["demo"]


def test_the_entry_of_a_service_without_its_head_is_told_until_something_else_is_put_down(state: Path) -> None:
    registry.register(an_entry("lost", os.getpid(), pid_created=0.0))
    for name in (None, "lost", None):
        with pytest.raises(ConfigError, match=r"the service 'lost' has lost its head.*up CONFIG --name lost resumes"):
            registry.choose(name, "service")
    assert names() == [] and files(state) == ["lost"]
    registry.register(an_entry())
    assert files(state) == ["demo"]


def test_entries_of_another_machine_are_left_as_they_are_in_a_home_directory_that_is_shared(state: Path) -> None:
    registry.register(an_entry("theirs", os.getpid(), pid_created=0.0, kind="run", host="elsewhere", loopback=False))
    registry.register(an_entry("private", os.getpid(), pid_created=0.0, host="elsewhere"))
    registry.register(an_entry())
    assert names() == ["demo", "theirs"], "a head on another machine's loopback cannot be asked from here"
    assert files(state) == ["demo", "private", "theirs"]
    with pytest.raises(ConfigError, match=r"'private'; it listens on 127.* of elsewhere alone; ask it there"):
        registry.choose("private")


def test_an_entry_that_another_has_replaced_is_not_taken_away() -> None:
    first, second = an_entry(), an_entry(address="127.0.0.1:7000")
    registry.register(second)
    registry.forget(first)
    assert registry.read("demo") == second
    registry.forget(second)
    assert registry.read("demo") is None
