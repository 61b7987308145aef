"""No endless wait: whatever can wait for another process, or for the network, says in the call how long.

Ray, the standard library and psutil wait for ever by default. So the source is read, and every call that may wait must
name its deadline; the few that wait on purpose are listed here with what ends them.
"""

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_probe

PACKAGE = Path(ray_probe.__file__).parent
LAUNCH = PACKAGE.parent / "launch.py"

FUNCTIONS = {
    "ray.get": ("timeout", None),
    "ray.wait": ("timeout", None),
    "ray.util.wait_placement_group_ready": ("timeout_seconds", 1),
    "subprocess.run": ("timeout", None),
    "subprocess.call": ("timeout", None),
    "subprocess.check_call": ("timeout", None),
    "subprocess.check_output": ("timeout", None),
    "os.system": None,
    "os.wait": None,
    "os.waitpid": None,
    "psutil.wait_procs": ("timeout", 1),
    "socket.create_connection": ("timeout", 1),
    "urllib.request.urlopen": ("timeout", 2),
    "http.client.HTTPConnection": ("timeout", 2),
    "http.client.HTTPSConnection": ("timeout", 2),
    "select.select": ("timeout", 3),
    "concurrent.futures.wait": ("timeout", 1),
    "concurrent.futures.as_completed": ("timeout", 1),
    "signal.sigwait": None,
    "signal.pause": None,
}
"""Where a call's deadline stands: its keyword and place; None for a call that takes none."""

METHODS = ("acquire", "communicate", "get", "join", "wait")
"""Of processes, threads, queues, locks and events: without a word they wait for ever (a dict's `get`, a string's `join`
take a word)."""

ON_PURPOSE = {
    ("checkpoints/node_cache.py", "fcntl.flock"): (
        "an actor waits for another's copy, which the pool's start deadline ends"
    ),
}


def waits(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of every call in the source that may wait for ever."""
    tree = ast.parse(source)
    names = dict(_imported(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (called := _may_wait(node, _dotted(node.func, names))):
            yield node.lineno, called


def _may_wait(call: ast.Call, name: str) -> str | None:
    """What a call is named when it may wait for ever; `name` is its function's, as far as that is known."""
    if name in FUNCTIONS:
        return None if _has_deadline(call, FUNCTIONS[name]) else name
    if name == "fcntl.flock":
        return None if any(word in ast.unparse(call) for word in ("LOCK_NB", "LOCK_UN")) else name
    if not isinstance(call.func, ast.Attribute) or call.func.attr not in METHODS:
        return None
    word = call.args[0] if call.args else ast.Constant(None)
    waits_for_ever = isinstance(word, ast.Constant) and word.value in (None, True)
    return f".{call.func.attr}" if waits_for_ever and not _has_deadline(call, ("timeout", None)) else None


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Local names of what is imported, with the names that it has at home."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((one.asname, one.name) for one in node.names if one.asname)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((one.asname or one.name, f"{node.module}.{one.name}") for one in node.names)


def _dotted(function: ast.expr, names: dict[str, str]) -> str:
    if isinstance(function, ast.Attribute):
        return f"{_dotted(function.value, names)}.{function.attr}"
    return names.get(function.id, function.id) if isinstance(function, ast.Name) else ""


def _has_deadline(call: ast.Call, place: tuple[str, int | None] | None) -> bool:
    if place is None:
        return False
    keyword, position = place
    given = [word.value for word in call.keywords if word.arg == keyword]
    given += call.args[position : position + 1] if position is not None else []
    return any(not (isinstance(value, ast.Constant) and value.value is None) for value in given)


def sources() -> Iterator[tuple[str, str]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        yield str(path.relative_to(PACKAGE)), path.read_text(encoding="utf-8")
    yield LAUNCH.name, LAUNCH.read_text(encoding="utf-8")


def test_every_call_that_can_wait_says_how_long() -> None:
    found = {(file, name, line) for file, source in sources() for line, name in waits(source)}
    assert {(file, name, line) for file, name, line in found if (file, name) not in ON_PURPOSE} == set()
    assert {(file, name) for file, name, _ in found} >= set(ON_PURPOSE), "an exception that is none any more"


@pytest.mark.parametrize(
    "source",
    [
        "import ray; ray.get(x)",
        "import ray; ray.get(x, timeout=None)",
        "import ray as r; r.wait([x], num_returns=1)",
        "from ray import get; get(x)",
        "import subprocess; subprocess.run(['x'], check=True)",
        "from subprocess import check_output as out; out(['x'])",
        "process.communicate()",
        "process.communicate(b'words')[:0]; process.wait()",
        "thread.join()",
        "thread.join(None)",
        "queue.get()",
        "queue.get(True)",
        "event.wait(timeout=None)",
        "lock.acquire()",
        "import socket; socket.create_connection((host, 1))",
        "from urllib.request import urlopen; urlopen(url)",
        "import fcntl; fcntl.flock(f, fcntl.LOCK_EX)",
        "import psutil; psutil.wait_procs(all)",
        "import os; os.waitpid(1, 0)",
    ],
)
def test_a_wait_without_an_end_is_found(source: str) -> None:
    assert list(waits(source)), source


def test_what_names_its_deadline_or_does_not_wait_is_let_through() -> None:
    source = """
        import fcntl, os, psutil, ray, socket, subprocess
        ray.get(x, timeout=0); ray.get(x, timeout=seconds); ray.wait([x], timeout=1.0)
        subprocess.run(command, timeout=5); process.communicate(timeout=3); process.wait(2)
        thread.join(seconds); ", ".join(names); os.path.join(a, b); {}.get("key"); queue.get(timeout=1)
        socket.create_connection(there, 2); psutil.wait_procs(all, 5); event.wait(0.5); lock.acquire(timeout=1)
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
    """
    assert list(waits(textwrap.dedent(source))) == []
