"""What is quoted of a process that crashed, and why a cluster cannot be joined."""

import errno
import os
from pathlib import Path

import pytest

from ray_probe.cluster.connection import join_check
from ray_probe.cluster.head.crash import crash_dump, telling_line
from ray_probe.cluster.pool.death_report import last_words
from ray_probe.errors import ClusterError, NoClusterError

FRAMES = """\
/venv/ray/_raylet.so(+0x181364c) [0x7fb93721364c] ray::RayLog::operator<< <>()
/lib/x86_64-linux-gnu/libstdc++.so.6(+0xa8e1a) [0x7fb9356a8e1a]
/venv/ray/_raylet.so(_ZN3ray4core17CoreWorkerProcess10InitializeERKNS0_17CoreWorkerOptionsE+0x34) [0x7f] ray::core::In()
python3.11(_start+0x21) [0x560e748ea081] _start
"""
TAIL = """\
*** SIGABRT received at time=1795893633 on cpu 1 ***
PC: @     0x7f46b7aa8eec  (unknown)  (unknown)
    @     0x7f46b7a5a050  135016656  (unknown)
[2026-11-28 19:20:33,386 E 9192 9192] logging.cc:474:     @     0x7f46b7a5a050  135016656  (unknown)
Fatal Python error: Aborted

Stack (most recent call first):
  File "/venv/ray/_private/worker.py", line 2729 in connect

Extension modules: msgpack._cmsgpack, google._upb._message, ray._raylet (total: 11)
"""
EVENTS = "/tmp/ray/session_2026/logs/events/event_CORE_WORKER_9526.log"
OTHER_USER = (
    "[2026-11-28 19:21:02,023 E 9526 9526] logging.cc:118: Unhandled exception: N6spdlog9spdlog_exE. what(): "
    f"Failed opening file {EVENTS} for writing: Permission denied /venv/ray/_raylet.so(+0x1812b9a) [0x7fb9] ray::a()\n"
    f"{FRAMES}\n{TAIL}"
)
BLANK_TOKEN = (
    "[2026-11-28 19:33:12,426 C 17962 17962] authentication_token_loader.cc:111:  An unexpected system state has "
    "occurred. Please report this issue. Check failed: !result.hasError() RAY_AUTH_TOKEN_PATH is set but file cannot "
    f"be opened or is empty: /t\n*** StackTrace Information ***\n{FRAMES}"
)
ODD_TOKEN = """\
E1128 19:33:10.220231871   17880 call.cc:1096]                         validate_metadata: INTERNAL:Illegal header value
E1128 19:33:10.220258091   17880 call_op_set.h:977]                    ASSERTION FAILED: false
"""
PYTHON = 'warning: failed before\nTraceback (most recent call last):\n  File "x.py", line 1\nOSError: no room\n'


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (OTHER_USER, f"Failed opening file {EVENTS} for writing: Permission denied"),
        (BLANK_TOKEN, "!result.hasError() RAY_AUTH_TOKEN_PATH is set but file cannot be opened or is empty: /t"),
        (ODD_TOKEN, "validate_metadata: INTERNAL:Illegal header value"),
        (PYTHON, "OSError: no room"),
        (f"hello\nFatal Python error: Segmentation fault\n{FRAMES}", "Fatal Python error: Segmentation fault"),
        ("one\ntwo\n", "one"),
        (FRAMES, None),
        ("", None),
    ],
    ids=["another user", "blank token", "odd token", "traceback", "segfault", "no fault named", "frames", "nothing"],
)
def test_of_a_crash_dump_the_line_is_quoted_that_says_why(words: str, line: str | None) -> None:
    assert telling_line(words) == line


def test_last_words_are_the_last_lines_unless_they_are_a_dump() -> None:
    assert last_words(["a\n", "b\n", "  c\n", "d\n"]) == "b; c; d"
    earlier = f"lookup failed, retried\n{PYTHON}"
    for before in ("", earlier, OTHER_USER.replace("Permission", "Admission")):
        lines = f"{before}round 3\n{OTHER_USER}".splitlines(keepends=True)
        assert last_words(lines).endswith("for writing: Permission denied"), "what came before is another matter"
    for before in (OTHER_USER, PYTHON):
        assert last_words(f"{before}a\nb\nc\n".splitlines(keepends=True)) == "a; b; c"
    assert last_words(PYTHON.splitlines(keepends=True)).endswith("; OSError: no room")
    assert last_words(f"ok\nFatal Python error: Segmentation fault\n\n{TAIL}".splitlines(keepends=True)) == (
        "Fatal Python error: Segmentation fault"
    )
    assert list(crash_dump(["a", "b"])) == []


def test_a_cluster_of_another_user_is_told_with_its_owner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    facts = {"returncode": -6, "last_words": f"Failed opening file {tmp_path}/gone/x.log: Permission denied"}
    reason = join_check.obstacle(facts)
    assert reason == f"Ray could not join the cluster: {facts['last_words']}", "a file of our own is no other user's"
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    owner = tmp_path.owner()
    remedy = f"its files belong to the user {owner}: run ray_probe as {owner}, or start Ray as this user"
    assert join_check.obstacle(facts) == f"{reason}; {remedy}"


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ECONNREFUSED, NoClusterError), (errno.EHOSTUNREACH, ClusterError), (-2, ClusterError)]
)
def test_only_a_refused_connection_says_that_the_cluster_is_gone(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[ClusterError]
) -> None:
    answer = {"unreachable": "why", "errno": number, "returncode": 0}
    monkeypatch.setattr(join_check, "rehearse", lambda address: answer)
    with pytest.raises(ClusterError, match=r"no Ray cluster answers there \(why\)") as refused:
        join_check.check_joinable("h:1")
    assert type(refused.value) is kind
