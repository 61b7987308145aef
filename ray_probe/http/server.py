"""A web server in a thread of this process, with its socket, token and address."""

import contextlib
import errno
import ipaddress
import json
import os
import secrets
import socket
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ray_probe.errors import ClusterError, ConfigError, bad_value
from ray_probe.system.clock import wait_until
from ray_probe.system.files import write_atomically

if TYPE_CHECKING:
    from starlette.types import ASGIApp

RECORD, TOKEN, KEYS = "http.json", "http-token", "http-keys.json"
"""Files in the directory of a service or run, mode 0600."""
ANY = ("0.0.0.0", "::")
START_S = 10.0
STOP_S = 5.0
CONNECTIONS = 1000
BACKLOG = 256
STUCK_MS = 30_000
SEND_BYTES = 1 << 18
"""What the kernel keeps of an answer for a client that does not read."""


@dataclass(frozen=True)
class Listen:
    """Where a server listens.

    Attributes:
        host: address of the interface.
        port: 0: a free one.
        names: host names of requests, beside localhost and the address.
    """

    host: str = "127.0.0.1"
    port: int = 0
    names: tuple[str, ...] = ()

    def check(self) -> None:
        """Raise ConfigError for an interface that requests cannot name."""
        if self.host in ANY and not self.names:
            remedy = "name this machine as browsers call it: --host-name NAME"
            raise ConfigError(bad_value("--host", self.host, remedy))

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names that a request may address."""
        return ("localhost", *(name.lower() for name in (self.host, *self.names) if name not in ANY))

    @property
    def url(self) -> str:
        """The address for a browser, without the token."""
        name = self.names[0] if self.names else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.port}/"


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def recorded(directory: Path) -> Listen | None:
    """Return where the server of a service listened last, or None."""
    try:
        raw = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        return Listen(raw["host"], raw["port"], tuple(raw["names"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(directory: Path, listen: Listen) -> None:
    """Write where a server listens, for its next process."""
    write_atomically(directory / RECORD, json.dumps(asdict(listen)).encode(), private=True)


def token_in(directory: Path) -> str:
    """Return the token of a service's server; makes it if missing."""
    path = directory / TOKEN
    with contextlib.suppress(FileNotFoundError):
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, encoding="ascii") as file:
            if token := file.read().strip():
                os.fchmod(descriptor, 0o600)
                return token
    token = secrets.token_urlsafe(32)
    write_atomically(path, token.encode(), private=True)
    return token


def forget_files(directory: Path) -> None:
    """Remove what a server keeps in a directory; the next one has another token."""
    for name in (RECORD, TOKEN, KEYS):
        (directory / name).unlink(missing_ok=True)


def open_socket(listen: Listen, token: str | None) -> socket.socket:
    """Return a listening socket.

    Raises:
        ConfigError: the address is not of this machine or is taken, or other machines reach it without a token.
    """
    if token is None and not is_loopback(listen.host):
        raise ConfigError(bad_value("--host", listen.host, "other machines reach it; that needs a token"))
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        remedy = f"is no address ({error}); use one of this machine"
        raise ConfigError(bad_value("--host", listen.host, remedy)) from None
    found = socket.socket(family, kind, protocol)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a restarted server takes its port at once
    # Connections inherit both: one that does not read ends, and holds little until then.
    found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BYTES)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STUCK_MS)
    try:
        found.bind(address)
        found.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        found.close()
        taken = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
        field, value = ("--port", listen.port) if taken or listen.port else ("--host", listen.host)
        reason = "another program listens there" if taken else f"cannot be listened at ({error})"
        raise ConfigError(bad_value(field, value, f"{reason}; choose another")) from None
    return found


class HttpServer:
    """Serves an application in a thread, until `stop` or the end of the process.

    Args:
        app: the application.
        listening: a listening socket.
    """

    def __init__(self, app: "ASGIApp", listening: socket.socket) -> None:
        import uvicorn

        config = uvicorn.Config(
            app, http="h11", ws="none", loop="asyncio", lifespan="off", access_log=False, log_config=None,
            server_header=False, proxy_headers=False, limit_concurrency=CONNECTIONS, timeout_graceful_shutdown=1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._socket = listening
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [listening]}, name="http", daemon=True
        )

    @property
    def port(self) -> int:
        """The port that it listens at."""
        port: int = self._socket.getsockname()[1]
        return port

    def start(self) -> "HttpServer":
        """Start the thread; returns once requests are answered."""
        self._thread.start()
        if not wait_until(lambda: self._server.started or not self._thread.is_alive(), START_S) or not self.is_alive():
            raise ClusterError("http: the server did not start; see its log in Ray's session directory")
        return self

    def is_alive(self) -> bool:
        """Return whether the thread serves."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread and its connections."""
        self._server.should_exit = True
        self._thread.join(STOP_S)
