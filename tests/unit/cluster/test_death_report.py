"""What is read from Ray's words about a dead actor."""

import pytest
from ray.exceptions import OutOfMemoryError

from ray_probe.cluster.pool import death_report as module
from ray_probe.cluster.pool.death_report import autopsy, by_memory, read_error
from ray_probe.cluster.pool.failure_policy import Died

KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: A
\tactor_id: e58f14ff05a8526f9f963da901000000
\tpid: 26271
\tnamespace: 2b2c
\tip: 192.0.2.2
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker \
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed \
by the OOM killer due to high memory usage, (2) ray stop --force was called."""
EXITED = """The actor died unexpectedly before finishing this task.
\tpid: 7
\tip: 10.0.0.3
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker exits \
unexpectedly. Worker exits with an exit code 3."""
RAISED = """The actor died because of an error raised in its creation task, \x1b[36mray::B.__init__()\x1b[39m \
(pid=26424, ip=192.0.2.2, actor_id=fce2, repr=<die.B object>)
           ^^^^^^^^^^^^^^
  File "/tmp/die.py", line 10, in __init__
    def __init__(self): raise ValueError("boom in init")
                        ^^^^^^^^^^^^^^
ValueError: boom in init"""
LOST = """The actor died unexpectedly before finishing this task.
\tpid: 5
\tip: 10.0.0.4
The actor died because its node has died. Node Id: 1234"""


@pytest.mark.parametrize(
    ("text", "reason", "pid", "address"),
    [
        (KILLED, "its process ended (Worker unexpectedly exits with a connection error code 2. End of file)", 26271,
         "192.0.2.2"),
        (EXITED, "its process ended (Worker exits unexpectedly. Worker exits with an exit code 3)", 7, "10.0.0.3"),
        (RAISED, "its constructor raised ValueError: boom in init", 26424, "192.0.2.2"),
        (LOST, "its node is gone", 5, "10.0.0.4"),
        ("something else\nand more", "RuntimeError: something else", None, None),
    ],
    ids=["killed", "exited", "raised", "node lost", "unknown"],
)  # fmt: skip
def test_the_cause_is_found_in_rays_words(text: str, reason: str, pid: int | None, address: str | None) -> None:
    death = read_error(RuntimeError(text))
    assert (death.reason, death.pid, death.address) == (reason, pid, address)


SIGKILLED = "its process ended (Worker unexpectedly exits with a connection error code 2. End of file)"
LOW = "its process ended (Task was killed due to the node running low on memory)"


@pytest.mark.parametrize(
    ("reason", "words", "memory"),
    [
        (SIGKILLED, "", True),
        (SIGKILLED, "Loading weights: 100%", True),
        (SIGKILLED, "*** SIGSEGV received at time=1 on cpu 0 ***", False),
        (SIGKILLED, "Fatal Python error: Segmentation fault", False),
        ("its process ended (Worker exits with an exit code 3)", "", False),
        ("its node is gone", "", False),
        (LOW, "RuntimeError: of before", True),
    ],
)
def test_memory_is_held_to_have_run_out_when_ray_says_so_or_nothing_else_explains_a_sigkill(
    reason: str, words: str, memory: bool
) -> None:
    assert by_memory(RuntimeError(reason), reason, words) is memory


def test_rays_own_error_of_memory_is_one() -> None:
    assert by_memory(OutOfMemoryError("evicted"), "OutOfMemoryError: evicted", "")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        (LOST, Died("its node is gone, process 5 on node 10.0.0.4", node_lost=True)),
        (EXITED, Died("its process ended (Worker exits unexpectedly. Worker exits with an exit code 3), process 7 on "
                      "node 10.0.0.3")),
        (KILLED, Died(f"{SIGKILLED}, process 26271 on node 192.0.2.2", by_memory=True)),
    ],
    ids=["node lost", "exited", "killed"],
)  # fmt: skip
def test_a_death_is_told_with_process_and_node_though_the_node_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, text: str, seen: Died
) -> None:
    monkeypatch.setattr(module, "alive_nodes", list)
    assert autopsy(RuntimeError(text)) == seen
