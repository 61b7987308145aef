"""What is read from Ray's words about a dead actor."""

import pytest

from ray_probe.cluster.autopsy import read_error

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
