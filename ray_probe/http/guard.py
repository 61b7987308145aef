"""Checks every request before an endpoint: host, token, size and rate."""

import asyncio
import hashlib
import hmac
import time
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ray_probe.errors import bad_value
from ray_probe.http.answers import Json, error_answer, internal_error

OPEN_PATHS = ("/", "/healthz")
OPEN_PREFIX = "/static/"
WRITES = ("POST", "PUT", "PATCH", "DELETE")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY", "Cross-Origin-Resource-Policy": "same-origin",
}  # fmt: skip
MISSING = "Authorization: missing; send the header `Authorization: Bearer TOKEN`"
WRONG = "Authorization: wrong token; `ray-probe serve` prints the right one"


@dataclass(frozen=True)
class Access:
    """Which requests are let in.

    Attributes:
        token: of the bearer; None: no request needs one.
        hosts: names that a request may address, lower case.
        body_bytes: largest body.
        body_s: seconds that a body may take.
        send_s: seconds that a client may take to accept a part of an answer.
        writes: writes that may come at once.
        writes_per_s: writes a second that may follow.
    """

    token: str | None
    hosts: frozenset[str]
    body_bytes: int = 1_000_000
    body_s: float = 10.0
    send_s: float = 20.0
    writes: int = 30
    writes_per_s: float = 2.0


class WriteRate:
    """A bucket of writes that fills up again.

    Args:
        size: writes in the full bucket.
        per_s: writes a second that fill it.
        clock: monotonic seconds.
    """

    def __init__(self, size: int, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size, self._per_s, self._clock = float(size), per_s, clock
        self._left, self._looked = self._size, clock()

    def wait_s(self) -> float:
        """Take a write and return 0; else the seconds until there is one."""
        now = self._clock()
        self._left = min(self._size, self._left + (now - self._looked) * self._per_s)
        self._looked = now
        if self._left < 1.0:
            return (1.0 - self._left) / self._per_s
        self._left -= 1.0
        return 0.0


class Guard:
    """Refuses requests from outside `Access`, and adds headers of security to answers.

    Args:
        app: what it guards.
        access: which requests are let in.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access
        self._digest = None if access.token is None else _digest(access.token.encode())
        self._rate = WriteRate(access.writes, access.writes_per_s)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, itself or by the application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        answer = _Answer(scope, send, self._access.send_s)
        refusal = self._refusal(scope)
        try:
            if refusal is None:
                body = await self._body(scope, receive)
                if isinstance(body, bytes):
                    await self._app(scope, _replayed(body, receive), answer.send)
                    return
                refusal = body
            await refusal(scope, receive, answer.send)
        except SlowClientError:
            return
        except Exception as error:
            if answer.too_slow:
                return
            if answer.started:
                raise
            await internal_error(error)(scope, receive, answer.send)

    def _refusal(self, scope: Scope) -> Json | None:
        headers = Headers(scope=scope)
        host = _host_of(headers.get("host", ""))
        if host not in self._access.hosts:
            return error_answer(421, bad_value("Host", host, "name it with `serve --host-name`"))
        if scope["path"] not in OPEN_PATHS and not scope["path"].startswith(OPEN_PREFIX):
            if (wrong := self._wrong_token(headers)) is not None:
                return wrong
            if scope["method"] in WRITES and (wait_s := self._rate.wait_s()) > 0:
                text = f"rate: more than {self._access.writes_per_s:g} writes a second; try again in {wait_s:.1f} s"
                return error_answer(429, text, {"Retry-After": str(int(wait_s) + 1)})
        size = headers.get("content-length", "0")
        if not size.isdecimal() or int(size) > self._access.body_bytes:
            return _too_large(self._access.body_bytes)
        return None

    def _wrong_token(self, headers: Headers) -> Json | None:
        if self._digest is None:
            return None
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            return error_answer(401, MISSING, {"WWW-Authenticate": "Bearer"})
        # Digests have one length, so that the time to compare says nothing of the token.
        if not hmac.compare_digest(_digest(token.strip().encode("latin-1")), self._digest):
            return error_answer(403, WRONG)
        return None

    async def _body(self, scope: Scope, receive: Receive) -> bytes | Json:
        """Read the body; returns a refusal where it is too large or takes too long."""
        headers, body, more = Headers(scope=scope), bytearray(), True
        if "content-length" not in headers and "transfer-encoding" not in headers:
            return b""
        try:
            async with asyncio.timeout(self._access.body_s):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise SlowClientError
                    body += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(body) > self._access.body_bytes:
                        return _too_large(self._access.body_bytes)
        except TimeoutError:
            return error_answer(408, f"body: not complete after {self._access.body_s:g} s; send it again", CLOSE)
        return bytes(body)


CLOSE = {"Connection": "close"}


class SlowClientError(Exception):
    """The client has gone, or does not read what is sent."""


class _Answer:
    """Sends an answer with headers of security, to a client that reads it.

    Args:
        scope: of the request.
        send: of the server.
        send_s: seconds that the client may take to accept a part.
    """

    def __init__(self, scope: Scope, send: Send, send_s: float) -> None:
        self.started = self.too_slow = False
        self._api = scope["path"].startswith("/v1/")
        self._send, self._send_s = send, send_s

    async def send(self, message: Message) -> None:
        """Send a part."""
        if message["type"] == "http.response.start":
            self.started = True
            _add_headers(message, self._api)
        try:
            async with asyncio.timeout(self._send_s):
                await self._send(message)
        except TimeoutError:
            self.too_slow = True
            raise SlowClientError from None


def _add_headers(message: MutableMapping[str, Any], of_api: bool) -> None:
    headers = MutableHeaders(raw=message.setdefault("headers", []))
    for name, value in HEADERS.items():
        headers[name] = value
    if of_api:
        headers["Cache-Control"] = "no-store"


def _replayed(body: bytes, receive: Receive) -> Receive:
    left = [body]

    async def replay() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return replay


def _too_large(most: int) -> Json:
    return error_answer(413, f"body: larger than {most} bytes; name files by their path", CLOSE)


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()


def _host_of(header: str) -> str:
    """Return the name in a Host header, without its port."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]
