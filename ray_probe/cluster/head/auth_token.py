"""The token that Ray sends, checked before Ray reads it."""

import codecs
import os
from pathlib import Path

from ray_probe.errors import ClusterError, bad_value

BYTE_ORDER_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
MAX_TOKEN_BYTES = 8192  # gRPC sends no header above 16 kB, and Kubernetes writes tokens of 1 to 2 kB


def token_mode() -> bool:
    """Returns whether Ray in this environment sends and requires a token."""
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def token_place() -> str | None:
    """Returns where Ray finds a token that it can send, or None; never the token."""
    if _is_of_kubernetes():
        return "the service account's token"
    try:
        place, line = _read_token()
    except OSError:
        return None
    return place if _flaw(line) is None else None


def require_token(address: str | None) -> None:
    """Raises ClusterError for token mode without a usable token."""
    # Ray itself would end the process with SIGABRT.
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
    """Returns the token's place and the line that Ray reads. Raises OSError."""
    if text := os.environ.get("RAY_AUTH_TOKEN"):
        return "RAY_AUTH_TOKEN", os.fsencode(text)
    path = os.environ.get("RAY_AUTH_TOKEN_PATH") or str(Path.home() / ".ray" / "auth_token")
    with open(path, "rb") as file:
        return path, file.readline(2 * MAX_TOKEN_BYTES)


def _flaw(line: bytes) -> str | None:
    """Returns why Ray cannot send this token, with a remedy and without the token."""
    token = line.strip()  # as Ray does; characters other than printable ASCII end the process in gRPC
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
