"""The environment variables and the private directory with which Ray is started or joined.

Ray reads RAY_AUTH_* from the environment of each process, so the variables are set around a session and put back.
"""

import codecs
import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from ray_probe.cluster.head.ray_private import (
    BREAKPOINT_VARIABLE,
    LOOPBACK_VARIABLE,
    UV_HOOK_VARIABLE,
    loopback_constant,
    reload_auth,
)
from ray_probe.cluster.head.stale_dirs import in_use, remove_leftovers
from ray_probe.errors import ClusterError, bad_value

PREFIX = "rp-"
BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_TOKEN_BYTES = 8192  # gRPC sends no header above 16 kB, and Kubernetes writes tokens of 1 to 2 kB
READ_BYTES = 2 * MAX_TOKEN_BYTES
MAX_TMP_CHARS = 24  # the path of a socket ends at 107 characters, of which Ray and we use up to 83

# One token for every cluster that this process starts: Ray caches it in the process, so a second cluster would
# refuse us should `reload_auth` find no way to drop that cache.
_TOKEN = secrets.token_hex(32)


@contextlib.contextmanager
def private_dir() -> Iterator[str]:
    """A directory with a short path that only we can enter, with our token in it, for the block.

    Those that killed processes have left are removed first.
    """
    parent = tempfile.gettempdir() if len(tempfile.gettempdir()) <= MAX_TMP_CHARS else "/tmp"
    remove_leftovers(Path(parent), PREFIX)
    path = tempfile.mkdtemp(prefix=PREFIX, dir=parent)
    try:
        with in_use(Path(path)):
            descriptor = os.open(_own_token(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w") as file:
                file.write(_TOKEN)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def env_to_start(temp_dir: str) -> dict[str, str | None]:
    """Variables for a Ray that is started here; what the user has said about tokens stands."""
    changes: dict[str, str | None] = {"RAY_USAGE_STATS_ENABLED": "0"}
    changes[UV_HOOK_VARIABLE] = "0"
    if os.environ.get("RAY_AUTH_MODE", "token").lower() == "token":
        changes["RAY_AUTH_MODE"] = "token"
        if not (os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")):
            changes["RAY_AUTH_TOKEN_PATH"] = _own_token(temp_dir)
    return changes


def env_to_join(address: str, token_path: str | None, own: bool = False) -> dict[str, str | None]:
    """Variables for joining; a token lying ready is used for `auto` and our own heads, not sent to any named host.

    Args:
        address: auto or host:port.
        token_path: the token of a cluster that ray_probe started, None where it lies elsewhere.
        own: ray_probe started the cluster.
    """
    changes: dict[str, str | None] = {UV_HOOK_VARIABLE: "0"} if own else {}
    if token_path is not None:
        return changes | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": token_path, "RAY_AUTH_TOKEN": None}
    if (own or address == "auto") and "RAY_AUTH_MODE" not in os.environ and token_place():
        return changes | {"RAY_AUTH_MODE": "token"}
    return changes


@contextlib.contextmanager
def environment(changes: Mapping[str, str | None]) -> Iterator[None]:
    """Set variables (None: unset) for the block, for Ray in this process too, and put the old ones back."""
    before = {name: os.environ.get(name) for name in (*changes, BREAKPOINT_VARIABLE)}
    try:
        _set(changes)
        yield
    finally:
        _set(before)


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """Have a Ray that is started in the block, all of its processes, listen on 127.0.0.1 alone; one is joined there."""
    with environment({LOOPBACK_VARIABLE: "0"}), loopback_constant():
        yield


def token_mode() -> bool:
    """Whether Ray in this environment sends and asks for a token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def token_place() -> str | None:
    """Where Ray finds a token that it can send, or None where it finds none; never the token itself."""
    if _is_of_kubernetes():
        return "the service account's token"
    try:
        place, line = _read_token()
    except OSError:
        return None
    return place if _flaw(line) is None else None


def require_token(address: str | None) -> None:
    """Refuse token mode without a token that Ray can send, before Ray does: it ends the process (SIGABRT)."""
    if not token_mode() or _is_of_kubernetes():
        return
    try:
        place, line = _read_token()
    except OSError as error:
        if given := os.environ.get("RAY_AUTH_TOKEN_PATH"):
            remedy = f"there is no readable token ({error.strerror}); name a file that this user can read"
            raise ClusterError(bad_value("RAY_AUTH_TOKEN_PATH", given, remedy)) from None
        places = "RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token"
        remedy = f"RAY_AUTH_MODE is token, but there is no readable token in {places}"
        raise ClusterError(bad_value("cluster.address", address, remedy)) from None
    if (flaw := _flaw(line)) is not None:
        named = "RAY_AUTH_TOKEN: " if place == "RAY_AUTH_TOKEN" else f"RAY_AUTH_TOKEN_PATH: got {place!r}; "
        raise ClusterError(named + flaw)


def _is_of_kubernetes() -> bool:
    return bool(os.environ.get("RAY_ENABLE_K8S_TOKEN_AUTH")) and not os.environ.get("RAY_AUTH_TOKEN")


def _read_token() -> tuple[str, bytes]:
    """Where the token lies, and the line that Ray takes it from. Raises OSError when its file cannot be read."""
    if text := os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN", os.fsencode(text)
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    with open(path, "rb") as file:
        return path, file.readline(READ_BYTES)


def _flaw(line: bytes) -> str | None:
    """What keeps Ray from sending a token, and the remedy, without the token; None: nothing.

    Ray strips the blanks around a token. Other characters than printable ASCII end the process in gRPC.
    """
    token = line.strip()
    other = next((place for place, byte in enumerate(token) if not 0x20 <= byte <= 0x7E), None)
    if not token:
        return "its first line is blank; put the token there, alone"
    if token.startswith(BYTE_ORDER_MARKS):
        return "the token begins with a byte order mark (BOM); save it as ASCII without one"
    if other is not None:
        return f"byte {other + 1} of the token is not printable ASCII; write the token again"
    if len(token) > MAX_TOKEN_BYTES:
        return f"its first line is longer than a token ({MAX_TOKEN_BYTES} bytes); name the file of the token"
    return None


def _own_token(temp_dir: str) -> str:
    return os.path.join(temp_dir, "token")


def _set(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    _reload_auth()


def _reload_auth() -> None:
    """Have a Ray that is loaded already read RAY_AUTH_* again.

    A thread that is still ending the last session aborts the process when it finds mode "token" and no token, so then
    Ray keeps what it has.
    """
    if "ray" in sys.modules and not (token_mode() and token_place() is None):
        reload_auth()
