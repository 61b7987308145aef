"""All processes of a session are ended, whatever group they are in, and no others."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from ray_probe.cluster.head.process_session import END_S, end_session, is_over, members, wait_for

LEADER = """
import os, subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
for group in (None, 0):
    with_group = dict(process_group=group) if group is not None else {}
    started = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, **with_group)
    started.stdout.readline()
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture
def leader() -> Iterator["subprocess.Popen[str]"]:
    """The leader of a session with two children, one of them in a process group of its own."""
    command = [sys.executable, "-c", LEADER]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    end_session(process.pid)
    process.wait(END_S)
    process.stdout.close()


def test_every_process_of_a_session_ends_and_no_other(leader: "subprocess.Popen[str]") -> None:
    family = [leader.pid, *(child.pid for child in psutil.Process(leader.pid).children(recursive=True))]
    assert len({os.getpgid(pid) for pid in family}) == 2
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as other:
        assert sorted(members(leader.pid)) == sorted(family)
        assert end_session(leader.pid) == []
        assert all(is_over(pid) for pid in family) and not is_over(other.pid)
        other.kill()
    assert leader.wait(END_S) == -signal.SIGKILL


def test_children_of_a_leader_that_is_gone_are_found(leader: "subprocess.Popen[str]") -> None:
    leader.kill()
    assert wait_for(leader.pid, END_S) and leader.returncode is None, "its id is not taken away"
    assert len(members(leader.pid)) == 2
    assert end_session(leader.pid) == [] and members(leader.pid) == []


def test_this_process_is_no_member_of_its_own_session() -> None:
    assert os.getpid() not in members(os.getsid(0))


def test_waiting_has_an_end(leader: "subprocess.Popen[str]") -> None:
    start = time.monotonic()
    assert not wait_for(leader.pid, 0.1)
    assert time.monotonic() - start < 5
