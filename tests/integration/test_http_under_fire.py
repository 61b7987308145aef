"""Whatever is sent to the HTTP interface of a service breaks neither the server nor a measurement."""

import contextlib
import json
import os
import selectors
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from support.browser import chromium, tab
from support.served import figures, served, server_pid
from support.shell import Shell

from ray_probe.errors import ClusterError
from ray_probe.page.words import Words
from ray_probe.report.number_format import with_error
from ray_probe.service.client import ProbeClient
from ray_probe.system.clock import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.slow, pytest.mark.timeout(900)]
EXAMPLES = 25
STREAMS = 200
ROUNDS = 12


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Shell, str]]:
    with served(tmp_path_factory.mktemp("home"), ROUNDS) as found:
        yield found


@pytest.fixture
def shell(service: tuple[Shell, str]) -> Shell:
    return service[0]


@pytest.fixture
def url(service: tuple[Shell, str]) -> str:
    return service[1]


class Crowd:
    """Event streams that are read in one thread, and one that never is.

    Attributes:
        received: bytes of each stream.
    """

    def __init__(self, port: int, token: str) -> None:
        self.received: dict[socket.socket, bytearray] = {}
        self._selector = selectors.DefaultSelector()
        request = f"GET /v1/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n\r\n".encode()
        for _ in range(STREAMS):
            stream = socket.create_connection(("127.0.0.1", port), 30)
            stream.sendall(request)
            self.received[stream] = bytearray()
            self._selector.register(stream, selectors.EVENT_READ)
        self.slow = socket.create_connection(("127.0.0.1", port), 30)
        self.slow.sendall(request)

    def read(self, seconds: float) -> None:
        """Reads what comes in this time."""
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                part = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                assert part, "the server ended a stream that is read"
                self.received[key.fileobj] += part  # type: ignore[index]

    def events(self) -> list[list[tuple[str, Any]]]:
        """Kind and data of the events of each stream."""
        found = []
        for raw in self.received.values():
            blocks = [block.splitlines() for block in raw.decode().split("\n\n")[:-1]]  # the last one may be cut
            fields = [dict(line.split(": ", 1) for line in block if ": " in line) for block in blocks]
            found.append([(one["event"], json.loads(one["data"])) for one in fields if "event" in one])
        return found

    def close(self) -> None:
        for stream in (*self.received, self.slow):
            stream.close()


def giant(port: int, token: str) -> bytes:
    """The answer to a body of 2 GB, of which 64 kB are sent."""
    with socket.create_connection(("127.0.0.1", port), 30) as connection, contextlib.suppress(ConnectionResetError):
        head = f"POST /v1/measurements HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {token}\r\n"
        connection.sendall(f"{head}Content-Length: 2000000000\r\n\r\n".encode() + bytes(1 << 16))
        return connection.recv(1 << 16)
    return b""


def test_200_streams_a_slow_client_and_giant_bodies_leave_a_measurement_its_bits(shell: Shell, url: str) -> None:
    port, token = urlsplit(url).port, url.partition("#token=")[2]
    assert port is not None
    with ProbeClient.connect(url) as client:
        undisturbed = client.wait(client.probe(shell.home / "model"))
        crowd = Crowd(port, token)
        try:
            identity = client.probe(shell.home / "model")
            ends = time.monotonic() + 300
            while client.measured(identity)[0].finished is None:
                assert time.monotonic() < ends
                crowd.read(0.3)
                assert giant(port, token)[:12] in (b"HTTP/1.1 413", b"")
            crowd.read(5.0)
            disturbed = client.wait(identity)
        finally:
            crowd.close()
        assert figures(disturbed) == figures(undisturbed)
        assert [item.state for item in client.results()] == ["done", "done"]
    for events in crowd.events():
        kinds = Counter(kind for kind, _ in events)
        assert kinds["result"] == 1 and kinds["status"] >= 5 and not kinds["error"]
        assert ("result", {"id": identity, "state": "done"}) in events


def test_the_page_shows_the_service_and_asks_nobody_else(url: str) -> None:
    with ProbeClient.connect(url) as client, chromium() as browser, tab(browser) as opened:
        info, result = client.measured("m0001")
        assert result is not None and info.entropy is not None
        opened.page.goto(url)
        opened.wait_for("All figures of m0002")
        shown = opened.text()
        entropy = with_error(info.entropy.per_sequence, info.entropy.per_sequence_se)
        for words in (entropy, info.checkpoint.rpartition("/")[2], "m0001", "m0002", Words.of(result).verdict):
            assert words in shown, words
        assert "#token" not in opened.page.url, "the token leaves the address bar"
        base = url.partition("#")[0]
        assert all(asked.startswith((base, "data:")) for asked in opened.requests) and len(opened.requests) > 10


def test_the_server_outlives_a_restart_of_the_controller(
    shell: Shell, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(shell.home / "state"))
    with ProbeClient.connect() as through_ray, ProbeClient.connect(url) as client:
        server, controller = server_pid(), through_ray.pid()
        os.kill(controller, signal.SIGKILL)

        def answers() -> bool:
            with contextlib.suppress(ClusterError):  # 503 meanwhile
                return client.status().actors_alive == 1
            return False

        assert wait_until(answers, 120.0, 0.1)
        assert through_ray.pid() != controller and server_pid() == server


def operations(url: str) -> list[Any]:
    """All operations but the event stream, which has no end."""
    import schemathesis  # late: `make test`, which has none, collects this file too

    base, _, token = url.partition("/#token=")
    schema = schemathesis.openapi.from_url(f"{base}/v1/openapi.json", headers={"Authorization": f"Bearer {token}"})
    return [found.ok() for found in schema.get_all_operations() if found.ok().path != "/v1/events"]


@pytest.mark.parametrize("mode", ["positive", "negative"])
def test_no_request_breaks_the_server(url: str, shell: Shell, mode: str) -> None:
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import positive_data_acceptance

    headers = {"Authorization": f"Bearer {url.partition('#token=')[2]}"}
    seen: Counter[tuple[str, str, int]] = Counter()
    for operation in operations(url):

        @given(case=operation.as_strategy(generation_mode=GenerationMode(mode)))
        @settings(
            max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None,
            derandomize=True,
        )  # fmt: skip
        def check(case: Any) -> None:
            if case.path == "/v1/scale" and mode == "positive":
                case.body = {"actors": 1}  # the machine has no room for thousands
            answer = case.call(headers=headers, timeout=60)
            if answer.status_code == 429:
                time.sleep(float(answer.headers["retry-after"][0]))
                answer = case.call(headers=headers, timeout=60)
            seen[case.method, case.path, answer.status_code] += 1
            assert answer.status_code < 500, answer.text
            assert "Traceback" not in answer.text
            # A checkpoint of these names does not exist, so a request of the right form is refused.
            case.validate_response(answer, excluded_checks=[positive_data_acceptance])

        check()
    assert {status for _, path, status in seen if path == "/v1/status"} >= {200}
    with ProbeClient.connect(url) as client:
        client.drain(False)
        for item in client.results():
            if item.finished is None:
                client.cancel(item.id)
        assert client.status().state in ("idle", "measuring", "loading")
    log = (shell.home / "runs" / "demo" / "service.log").read_text()
    assert "Traceback" not in log
