"""Check whether Ray sends and requires a token, and whether others can read it."""

import ipaddress
import os
import stat
from pathlib import Path

from ray_probe.cluster.head.auth_token import require_token, token_mode, token_place
from ray_probe.cluster.head.environment import env_to_join, environment
from ray_probe.doctor.checks import Case, Finding

NO_TOKEN = "no token is sent, as RAY_AUTH_MODE is not token"


def token(case: Case) -> Finding:
    """Check the source of Ray's token; the finding never shows the token."""
    address = case.cluster.address
    if address is None:
        return _token_to_start()
    with environment(env_to_join(address, case.token_path)):
        require_token(address)
        if token_mode():
            return _source(f"sent to {address}", token_place())
    host = address.rpartition(":")[0]
    if host and not _is_loopback(host):
        open_to_all = f"{NO_TOKEN}: any host that reaches {host} can run code there"
        return Finding(open_to_all, "turn Ray's token authentication on")
    return Finding(NO_TOKEN)


def _token_to_start() -> Finding:
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        off = "off for a Ray started here, as RAY_AUTH_MODE says: any host that reaches its ports can run code"
        return Finding(off, "unset RAY_AUTH_MODE")
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        with environment({"RAY_AUTH_MODE": "token"}):
            require_token(None)
            return _source("asked for by a Ray started here", token_place())
    return Finding("a Ray started here asks for a token of its own, in a file that only this user can read")


def _source(use: str, place: str | None) -> Finding:
    """Name the token's source, with a warning if others can read its file."""
    detail = f"{use}, from {place}"
    path = Path(place or "")
    if not path.is_absolute():
        return Finding(detail)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o077:
        return Finding(f"{detail}, which others than its owner can use (mode {mode:04o})", f"chmod 600 {path}")
    return Finding(f"{detail} (mode {mode:04o})")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
