"""Sets the environment variables and the private directory of a Ray.

Ray reads RAY_AUTH_* from the environment of each process, so the variables are set for a session and then restored.
"""

import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ray_probe.cluster.head.auth_token import token_mode, token_place
from ray_probe.cluster.head.ray_private import (
    BREAKPOINT_VARIABLE,
    LOOPBACK_VARIABLE,
    UV_HOOK_VARIABLE,
    loopback_constant,
    reload_auth,
)
from ray_probe.cluster.head.stale_dirs import in_use, remove_leftovers

PREFIX = "rp-"
MAX_TMP_CHARS = 24  # the path of a socket has at most 107 characters; Ray's names and ours need up to 83 of them


@contextlib.contextmanager
def private_dir() -> Iterator[str]:
    """Creates a directory (0700) with a short path and a new token, for the block.

    Removes directories of killed processes first.
    """
    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= MAX_TMP_CHARS else "/tmp"
    remove_leftovers(Path(parent), PREFIX)
    path = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
    try:
        with in_use(Path(path)):
            descriptor = os.open(_own_token(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w") as file:
                file.write(secrets.token_hex(32))
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def env_to_start(temp_dir: str) -> dict[str, str | None]:
    """Returns the variables of a head; the user's own settings of tokens stay."""
    changes: dict[str, str | None] = {"RAY_USAGE_STATS_ENABLED": "0", UV_HOOK_VARIABLE: "0"}
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        changes["RAY_AUTH_MODE"] = "token"
        if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
            changes["RAY_AUTH_TOKEN_PATH"] = _own_token(temp_dir)
    return changes


def env_to_join(address: str, token_path: str | None, own: bool = False) -> dict[str, str | None]:
    """Returns the variables of a process that joins a cluster.

    Args:
        address: auto or host:port.
        token_path: file of the token of a cluster that ray_probe started; None: in Ray's own places.
        own: ray_probe started the cluster.
    """
    changes: dict[str, str | None] = {UV_HOOK_VARIABLE: "0"} if own else {}
    if token_path is not None:
        return changes | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_path, "RAY_AUTH_TOKEN": None}
    # No token is sent to an arbitrary named host unless the user asks for that.
    if (own or address == "auto") and "RAY_AUTH_MODE" not in os.environ and token_place():
        return changes | {"RAY_AUTH_MODE": "token"}
    return changes


@contextlib.contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Sets variables (None: unset) for the block, also in a loaded Ray."""
    before = {name: os.environ.get(name) for name in (*changes, BREAKPOINT_VARIABLE)}
    try:
        _set(changes)
        yield
    finally:
        _set(before)


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Makes Ray listen on, or join at, 127.0.0.1 only, for the block."""
    with environment({LOOPBACK_VARIABLE: "0"}), loopback_constant():
        yield


def _own_token(temp_dir: str) -> str:
    return os.path.join(temp_dir, "token")


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    # Without a token, a thread of Ray that still ends the last session would abort the process in token mode.
    if "ray" in sys.modules and not (token_mode() and token_place() is None):
        reload_auth()
