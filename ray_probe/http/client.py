"""The controller of a service over HTTP, with the standard library alone."""

import http.client
import json
import os
import secrets
import selectors
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, urlencode, urlsplit

from ray_probe.controller.replies import BetaReply, Followed, MeasurementInfo, Scaled, Status, Variance
from ray_probe.errors import (
    ClusterError,
    ConfigError,
    MissingError,
    NoClusterError,
    OutputError,
    ProbeError,
    StateError,
    bad_value,
)
from ray_probe.run.result import Result
from ray_probe.run.series import Series
from ray_probe.system.json_object import JsonObject

TOKEN_VARIABLE = "RAY_PROBE_TOKEN"
ANSWER_S = 25.0  # the server waits 20 s for the controller
QUEUE_S = 3600.0  # a checkpoint of tens of GB is copied
CONNECT_S = 10.0
RETRY_S = 15.0
"""How long a server that has answered before may be away: Ray restarts it."""
PAUSE_S = 0.2
LOOK_S = 0.5
ERRORS: Mapping[int, type[ProbeError]] = {
    404: MissingError, 409: StateError, 500: ProbeError, 503: ClusterError, 507: OutputError,
}  # fmt: skip
"""Error by HTTP status; others above 500 are of the cluster, and those below of the request."""

Meanwhile = Callable[[], None]
ReplyT = TypeVar("ReplyT", bound=JsonObject)


def is_url(address: str | None) -> bool:
    """Return whether an address is one of HTTP rather than of Ray."""
    return address is not None and address.startswith(("http://", "https://"))


class _AwayError(Exception):
    """The server does not take the connection, or ended it."""


class HttpController:
    """A controller that is asked over HTTP; the same methods as through Ray.

    Args:
        url: of the server, with the token in its fragment (`#token=...`) or without.
        token: of the bearer; None: the URL's, else that in RAY_PROBE_TOKEN.

    Raises:
        ConfigError: the URL is wrong, or the server refuses the token.
        ClusterError: nothing answers there.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        self._secure, self._host, self._port, self._path, in_url = _parts(url)
        self.url = f"{'https' if self._secure else 'http'}://{self._netloc}{self._path}/"
        self._token = token or in_url or os.environ.get(TOKEN_VARIABLE) or None
        if self._token is not None and not (self._token.isascii() and self._token.isprintable()):
            raise ConfigError(f"{TOKEN_VARIABLE}: holds characters that no token has; copy it anew")
        self._answered = False
        status = self.status()
        self.name, self.kind, self.namespace = status.name, status.kind, status.namespace

    @property
    def _netloc(self) -> str:
        return f"{f'[{self._host}]' if ':' in self._host else self._host}:{self._port}"

    def queue(self, settings: Mapping[str, Any]) -> str:
        """Queue a measurement with these settings by dotted key; returns its id."""
        headers = {"Idempotency-Key": secrets.token_urlsafe(16)}  # a repetition queues nothing more
        body = {"settings": dict(settings)}
        found = self._ask("POST", "measurements", body=body, headers=headers, deadline_s=QUEUE_S)
        return _read(MeasurementInfo, found).id

    def cancel(self, measurement: str, deadline_s: float = ANSWER_S) -> MeasurementInfo:
        """Withdraw a waiting measurement, or stop the running one after whole rounds."""
        path = f"measurements/{_quoted(measurement)}/cancel"
        return _read(MeasurementInfo, self._ask("POST", path, deadline_s=deadline_s))

    def drain(self, on: bool = True) -> None:
        """Accept no more measurements and finish the waiting ones; False: accept again."""
        self._ask("POST", "drain", body={"on": on})

    def scale(self, actors: int) -> Scaled:
        """Ask for this many rollout actors; `status` shows when they have started."""
        return _read(Scaled, self._ask("POST", "scale", body={"actors": actors}))

    def status(self, deadline_s: float = ANSWER_S) -> Status:
        """Return the status."""
        return _read(Status, self._ask("GET", "status", deadline_s=deadline_s))

    def results(self) -> tuple[MeasurementInfo, ...]:
        """Return all measurements, oldest first."""
        return tuple(_read(MeasurementInfo, item) for item in self._ask("GET", "results"))

    def measured(self, measurement: str | None = None) -> tuple[MeasurementInfo, Result | None]:
        """Return a measurement and its result so far; None before the first round."""
        found = self._ask("GET", f"results/{'latest' if measurement is None else _quoted(measurement)}")
        result = found.get("result")
        return _read(MeasurementInfo, found["info"]), None if result is None else _read(Result, result)

    def follow(
        self, measurement: str, cursor: int, deadline_s: float = ANSWER_S, meanwhile: Meanwhile = lambda: None
    ) -> Followed:
        """Return a measurement's events since `cursor`.

        `meanwhile` is called twice a second during the wait.
        """
        path, query = f"results/{_quoted(measurement)}/progress", {"cursor": min(cursor, 2**53 - 1)}
        return _read(Followed, self._ask("GET", path, query, deadline_s=deadline_s, meanwhile=meanwhile))

    def beta(self, version: int | None = None, measurement: str | None = None) -> BetaReply:
        """Return a version of the fitted baseline; None: the newest."""
        return _read(BetaReply, self._ask("GET", "beta", {"version": version, "measurement": measurement}))

    def variance(self, measurement: str | None = None) -> Variance:
        """Return variances over whole rounds."""
        return _read(Variance, self._ask("GET", "variance", {"measurement": measurement}))

    def logs(self, measurement: str | None = None, lines: int = 100) -> tuple[str, ...]:
        """Return the last lines of a measurement's log, or (None) of the service's."""
        return tuple(self._ask("GET", "logs", {"measurement": measurement, "lines": lines}))

    def series(self) -> tuple[Series, ...]:
        """Return the series of the service's measurements, by name."""
        return tuple(_read(Series, item) for item in self._ask("GET", "series"))

    def _ask(
        self, method: str, path: str, query: Mapping[str, Any] | None = None, body: object = None,
        headers: Mapping[str, str] | None = None, deadline_s: float = ANSWER_S, meanwhile: Meanwhile = lambda: None,
    ) -> Any:  # fmt: skip
        """Return the JSON of an answer; asks again while a known server is away."""
        given = {key: value for key, value in (query or {}).items() if value is not None}
        place = f"{self._path}/v1/{path}" + (f"?{urlencode(given)}" if given else "")
        ends, gone = time.monotonic() + deadline_s, time.monotonic() + min(deadline_s, RETRY_S)
        repeatable = method == "GET" or headers is not None
        while True:
            try:
                status, raw, wait_s = self._exchange(method, place, body, headers or {}, ends, meanwhile)
            except _AwayError as error:
                if not (repeatable and self._answered) or time.monotonic() >= gone:
                    raise self._unreachable(error) from None
            else:
                if status != 429 or time.monotonic() + wait_s >= ends:
                    return self._value(status, raw)
                time.sleep(wait_s)
            meanwhile()
            time.sleep(PAUSE_S)

    def _exchange(
        self, method: str, place: str, body: object, headers: Mapping[str, str], ends: float, meanwhile: Meanwhile
    ) -> tuple[int, bytes, float]:
        """Return status, body, and the seconds after which the server wants the request."""
        connection = self._connection()
        sent = {"Accept": "application/json", "Connection": "close"} | dict(headers)
        if self._token is not None:
            sent["Authorization"] = f"Bearer {self._token}"
        data = None
        if body is not None:
            data, sent["Content-Type"] = json.dumps(body, default=os.fspath).encode(), "application/json"
        try:
            connection.request(method, place, data, sent)
            self._wait(connection, ends, meanwhile)
            answer = connection.getresponse()
            return answer.status, answer.read(), float(answer.getheader("Retry-After") or 0)
        except TimeoutError:
            remedy = "ask again, or see that the server is not overloaded"
            raise ClusterError(f"{self.url}: no answer in time; {remedy}") from None
        except OSError as error:
            raise _AwayError(error.strerror or str(error)) from None
        except http.client.HTTPException as error:  # its text may be bytes of another protocol
            raise _AwayError(f"no HTTP, {type(error).__name__}") from None
        finally:
            connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        if not self._secure:
            return http.client.HTTPConnection(self._host, self._port, timeout=CONNECT_S)
        return http.client.HTTPSConnection(
            self._host, self._port, timeout=CONNECT_S, context=ssl.create_default_context()
        )

    def _wait(self, connection: http.client.HTTPConnection, ends: float, meanwhile: Meanwhile) -> None:
        """Wait until the answer begins. Raises TimeoutError at the deadline."""
        assert connection.sock is not None, "the request is sent"
        with selectors.DefaultSelector() as selector:
            selector.register(connection.sock, selectors.EVENT_READ)
            while not selector.select(max(0.0, min(LOOK_S, ends - time.monotonic()))):
                meanwhile()
                if time.monotonic() >= ends:
                    raise TimeoutError

    def _value(self, status: int, raw: bytes) -> Any:
        try:
            found = json.loads(raw)
        except ValueError:
            found = None
        if status < 300 and found is not None:
            self._answered = True
            return found
        text = found.get("error") if isinstance(found, dict) else None
        if not isinstance(text, str):
            raise ClusterError(f"{self.url}: answers with status {status} and is no server of ray_probe; check the URL")
        if status in (401, 403):
            remedy = "`ray-probe serve` prints the URL with the token"
            missing = f"the server wants a token: set it to the part after `#token=`; {remedy}"
            raise ConfigError(f"{TOKEN_VARIABLE}: {missing if status == 401 else f'the server refuses it; {remedy}'}")
        raise ERRORS.get(status, ClusterError if status >= 500 or status == 429 else ConfigError)(text)

    def _unreachable(self, error: Exception) -> ClusterError:
        kind = ClusterError if self._answered else NoClusterError
        return kind(f"{self.url}: does not answer ({error}); `ray-probe serve` starts it and prints its URL")


def _read(kind: type[ReplyT], raw: object) -> ReplyT:
    try:
        return kind.from_json(raw)
    except ValueError as error:
        remedy = "use the same version of ray_probe on both sides"
        raise ClusterError(f"the server's {kind.__name__} cannot be read ({error}); {remedy}") from None


def _quoted(measurement: str) -> str:
    return quote(measurement, safe="")


def _parts(url: str) -> tuple[bool, str, int, str, str | None]:
    """Return scheme is https, host, port, path and token of a URL."""
    shown = url.partition("#")[0]  # without the token
    try:
        parts = urlsplit(url)
        port = parts.port or (443 if parts.scheme == "https" else 80)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
            raise ValueError
    except ValueError:
        remedy = "need http://HOST:PORT/#token=TOKEN, as `ray-probe serve` prints it"
        raise ConfigError(bad_value("--url", shown, remedy)) from None
    (token,) = parse_qs(parts.fragment).get("token", [None])[:1]
    return parts.scheme == "https", parts.hostname, port, parts.path.rstrip("/"), token


