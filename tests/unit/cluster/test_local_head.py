"""A head as its starter sees it; a script stands in for the head's process."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ray_probe.cluster.head import local_head as heads
from ray_probe.cluster.head.local_head import Head, StartedHead, end, start
from ray_probe.cluster.head.process_session import members
from ray_probe.errors import ClusterError
from ray_probe.system import processes

REPORTS = """
import json, os, subprocess, sys, time
options = json.loads(sys.stdin.readline())
print("options", options, flush=True)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], process_group=0)
facts = {"address": "127.0.0.1:1", "token_path": None, "temp_dir": options["place"]}
os.write(int(sys.argv[1]), json.dumps(facts).encode())
time.sleep(0.1)
os.write(int(sys.argv[1]), b"\\n")
"""
WAITS = "word = sys.stdin.readline()\nprint('word', word, flush=True)\n"
STAYS = WAITS + "time.sleep(60 if word else 0)\nchild.kill()\n"
DEAF = "time.sleep(60)\n"

Starts = Callable[..., StartedHead]


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Starts]:
    """Starts a head of this code; what it leaves is ended."""
    started: list[StartedHead] = []

    def begin(code: str, log: Path | None = None) -> StartedHead:
        monkeypatch.setattr(heads, "_CODE", code)
        (tmp_path / "place").mkdir(exist_ok=True)
        started.append(start({"place": str(tmp_path / "place")}, log))
        return started[-1]

    yield begin
    for head in started:
        head.kill()


def test_a_head_that_is_there_says_where_and_ends_with_all_of_its_processes(starts: Starts, tmp_path: Path) -> None:
    started = starts(REPORTS + DEAF)
    head = started.ready()
    assert head == Head(head.pid, processes.created(head.pid), "127.0.0.1:1", None, str(tmp_path / "place"))
    assert started.ready() is head and not started.is_gone()
    assert os.getsid(head.pid) == head.pid != os.getsid(0) and len(members(head.pid)) == 2
    start_s = time.monotonic()
    started.close()
    assert time.monotonic() - start_s < 5, "it does not heed its pipe, and was killed"
    assert members(head.pid) == [] and started.is_gone() and not (tmp_path / "place").exists()
    started.close()


def test_a_head_that_heeds_its_pipe_ends_by_itself(starts: Starts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "LEAVE_S", 30.0)
    started = starts(REPORTS + STAYS)
    pid = started.ready().pid
    started.close()
    assert not psutil.pid_exists(pid)


def test_a_head_that_stays_is_ended_by_another_process(starts: Starts) -> None:
    started = starts(REPORTS + STAYS)
    head = started.ready()
    started.stay()
    assert not end(head.pid, (head.created or 0.0) + 1.0), "that process is gone, and its id is another's"
    assert not started.is_gone()
    family = [psutil.Process(pid) for pid in members(head.pid)]
    os.kill(family[-1].pid, signal.SIGKILL)  # which a real head does itself
    assert end(head.pid, head.created)
    assert started.is_gone() and not end(head.pid, head.created)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise SystemExit('no room for its sockets')", "Ray did not start on this machine (no room for its sockets)"),
        ("import os; os.abort()", "Ray did not start on this machine (no output)"),
        ("import time; time.sleep(60)", "Ray did not start on this machine (no answer after 0.5 s)"),
        ("import os, sys; os.write(int(sys.argv[1]), b'{\"refused\": \"why\"}\\n')", "why"),
    ],
)
def test_a_head_that_does_not_start_is_reported_with_its_last_words(
    starts: Starts, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    monkeypatch.setattr(heads, "START_S", 0.5 if "sleep" in code else 60.0)
    with pytest.raises(ClusterError) as refusal:
        starts(code).ready()
    assert str(refusal.value).removeprefix("cluster: ") == reason


def test_the_words_of_a_head_that_stays_are_added_to_its_log_and_earlier_words_are_not_reported(
    starts: Starts, tmp_path: Path
) -> None:
    log = tmp_path / "head.log"
    log.write_text("an earlier head ended\n")
    with pytest.raises(ClusterError, match=rf"\(no output\); see {log}"):
        starts("pass", log).ready()
    with pytest.raises(ClusterError, match=r"\(mine\); see"):
        starts("print('mine')", log).ready()
    assert log.read_text() == "an earlier head ended\nmine\n"
    fresh = tmp_path / "fresh.log"
    with pytest.raises(ClusterError):
        starts("pass", fresh).ready()
    assert fresh.stat().st_mode & 0o777 == 0o600
