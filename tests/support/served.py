"""A small service that is served over HTTP, for tests on a cluster of their own."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from support.checkpoints import raw_config
from support.shell import Shell


@contextmanager
def served(home: Path, rounds: int) -> Iterator[tuple[Shell, str]]:
    """Starts a service `demo` with one actor; yields its shell and its URL with the token."""
    shell = Shell(home)
    raw = raw_config(home, batch={"rounds": rounds}, cluster={"actors": 1, "max_actors": 2})
    (home / "service.yaml").write_text(yaml.safe_dump(raw))
    try:
        # The limit is for a machine with other work.
        up = json.loads(shell.run("up", "service.yaml", "--name", "demo", "--http", "--json", seconds=240))
        yield shell, up["url"]
    finally:
        if (home / "state/ray_probe/demo.json").exists():
            shell.run("down", "--run", "demo")


def server_pid() -> int:
    """The process of the server; this process must be connected."""
    from ray_probe.cluster.http_actor import find_server

    found = find_server("demo", "ray_probe")
    assert found is not None
    return found.pid()


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """The parts of a result that do not depend on the clock or the place."""
    return {key: result[key] for key in ("beta", "entropy", "advantage_variance", "gradient", "parity", "partial")}
