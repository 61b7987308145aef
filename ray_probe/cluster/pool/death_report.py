"""Why an actor died: Ray's reason, the process's last lines, its node's memory.

Ray only reports that an actor died unexpectedly. The cause is in the log of the process, on its node.
"""

import glob
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

import psutil
from ray.exceptions import OutOfMemoryError

from ray_probe.cluster.connection.nodes import alive_nodes, ask_nodes
from ray_probe.cluster.connection.ray_errors import first_line, plain_text
from ray_probe.cluster.head.crash import crash_dump, telling_line
from ray_probe.cluster.head.ray_private import logs_directory
from ray_probe.cluster.pool.failure_policy import Died

LOOK_BACK_S = 5.0
LAST_LINES = 3
KEPT_LINES = 200  # a crash dump of Ray has about 100, and its reason is the first
MAX_WORDS = 240
NODE_GONE = "its node is gone"
_PID, _IP = re.compile(r"\bpid[:=] ?(\d+)"), re.compile(r"\bip[:=] ?([0-9a-fA-F.:]+[0-9a-fA-F])")
_NO_WORD = "End of file"  # Ray's wording after SIGKILL, which the kernel sends when memory runs out
_OTHER_CAUSE = re.compile(r"SIG[A-Z]+|Fatal|Traceback|Error\b|Segmentation|Aborted")
_DETAIL = re.compile(r"Worker exit detail: (.+?)(?:\. Some common causes|\.? *$)", re.MULTILINE)


@dataclass(frozen=True)
class Death:
    """A death as Ray's error describes it.

    Attributes:
        reason: one line.
        pid: process id, or None.
        address: of the node, or None.
    """

    reason: str
    pid: int | None
    address: str | None


@dataclass(frozen=True)
class LookBack:
    """The last lines of a dead process, and the share of its node's memory in use."""

    words: str
    memory_used: float


def read_error(error: BaseException) -> Death:
    """Read the reason of a death, and process and node, from Ray's error."""
    text = plain_text(error)
    pid, address = _PID.search(text), _IP.search(text)
    lines = [line.strip() for line in text.splitlines() if line.strip(" ^~")]
    if "creation task" in text and len(lines) > 1:
        reason = f"its constructor raised {lines[-1]}"
    elif "node has died" in text or "node was dead" in text.lower():
        reason = NODE_GONE
    elif detail := _DETAIL.search(text):
        reason = f"its process ended ({detail[1]})"
    else:
        reason = first_line(error)
    return Death(reason[:300], int(pid[1]) if pid else None, address[1] if address else None)


def look_back(pid: int) -> LookBack:
    """Return the last lines of a dead process of this node, and the memory in use."""
    logs = logs_directory()
    lines: list[str] = []
    if logs is not None:
        for path in sorted(glob.glob(os.path.join(logs, f"worker-*-{pid}.*"))):
            with open(path, encoding="utf-8", errors="replace") as file:
                lines += [line for line in file.readlines()[-KEPT_LINES:] if line.strip() and not line.startswith(":")]
    return LookBack(last_words(lines), psutil.virtual_memory().percent / 100)


def last_words(lines: Sequence[str]) -> str:
    """Return a process's last lines, or the line of a crash dump with the cause."""
    why = telling_line("".join(lines)) if crash_dump(lines) else None
    if why is not None:
        return why[:MAX_WORDS]
    return "; ".join(line.strip() for line in lines[-LAST_LINES:])[-MAX_WORDS:]


def autopsy(error: BaseException) -> Died:
    """Find out within seconds why an actor died."""
    death = read_error(error)
    node_lost = death.reason == NODE_GONE
    if death.pid is None or death.address is None:
        return Died(death.reason, by_memory(error, death.reason, ""), node_lost)
    nodes = [node for node in alive_nodes() if f"({death.address})" in node.name]
    answers = ask_nodes(nodes[:1], look_back, death.pid, seconds=LOOK_BACK_S) if nodes else []
    cause, words = f"{death.reason}, process {death.pid} on node {death.address}", ""
    for answer in answers:
        if isinstance(answer.value, LookBack):
            words = answer.value.words
            cause += f", memory {answer.value.memory_used:.0%} in use"
            cause += f", last words: {words}" if words else ", no last words"
    return Died(cause, by_memory(error, death.reason, words), node_lost)


def by_memory(error: BaseException, reason: str, words: str) -> bool:
    """Whether memory seems to have run out.

    It does where Ray says so, or the process ended without naming another cause.

    Args:
        error: Ray's error.
        reason: how the process ended.
        words: its last lines.
    """
    if isinstance(error, OutOfMemoryError) or "low on memory" in reason:
        return True
    return _NO_WORD in reason and _OTHER_CAUSE.search(words) is None
