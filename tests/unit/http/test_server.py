"""A server on a real socket: where it may listen, its token, its port, and clients that do not read."""

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_controller import FIRST, FakeController

from ray_probe.errors import ConfigError
from ray_probe.http.app import create_app
from ray_probe.http.guard import Access
from ray_probe.http.server import (
    HttpServer,
    Listen,
    forget_files,
    open_socket,
    recorded,
    token_in,
    write_record,
)
from ray_probe.http.streams import QUEUED, Broadcast
from ray_probe.system.clock import wait_until

LOCAL = frozenset({"localhost", "127.0.0.1"})


@contextlib.contextmanager
def served(controller: FakeController, access: Access, poll_s: float = 0.01) -> Iterator[HttpServer]:
    app = create_app(controller, access.token, [], Path("/nowhere"), access=access, broadcast=Broadcast(poll_s))
    server = HttpServer(app, open_socket(Listen(), None)).start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeController, HttpServer]]:
    controller = FakeController()
    with served(controller, Access(None, LOCAL, body_s=0.3, send_s=0.5)) as server:
        yield controller, server


@pytest.fixture
def controller(shared: tuple[FakeController, HttpServer]) -> FakeController:
    shared[0].__init__()  # type: ignore[misc]
    return shared[0]


@pytest.fixture
def port(shared: tuple[FakeController, HttpServer], controller: FakeController) -> int:
    return shared[1].port


def events(stream: http.client.HTTPResponse, count: int) -> list[tuple[str, Any, str | None]]:
    """The next events of a stream: kind, data, id."""
    found: list[tuple[str, Any, str | None]] = []
    fields: dict[str, str] = {}
    while len(found) < count:
        line = stream.readline().decode().rstrip("\n")
        assert line or fields or stream.fp is not None, "the stream ended"
        if line.startswith(":"):
            continue
        if line:
            name, _, value = line.partition(": ")
            fields[name] = value
        elif fields:
            found.append((fields["event"], json.loads(fields["data"]), fields.get("id")))
            fields = {}
    return found


@contextlib.contextmanager
def stream(port: int, query: str = "", last_id: int = 0) -> Iterator[http.client.HTTPResponse]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", f"/v1/events{query}", headers={"Last-Event-ID": str(last_id)})
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Content-Type")) == (200, "text/event-stream; charset=utf-8")
        yield answer
    finally:
        connection.close()


def test_a_service_stream_shows_the_status_and_what_ends(port: int, controller: FakeController) -> None:
    with stream(port) as answer:
        assert events(answer, 2)[1] == ("status", controller.state.to_json(), None)
        controller.end(FIRST)
        found = [event for event in events(answer, 6) if event[0] == "result"]
    assert found == [("result", {"id": FIRST, "state": "done"}, None)]


def test_a_measurement_is_followed_in_order_to_its_end(port: int, controller: FakeController) -> None:
    controller.events = [replace(controller.events[0], collected=number) for number in range(5)]
    with stream(port, f"?measurement={FIRST}") as answer:
        first = events(answer, 5)
        controller.events += [replace(controller.events[0], collected=number) for number in range(5, 9)]
        more = events(answer, 4)
        controller.end(FIRST)
        assert events(answer, 1) == [("result", {"id": FIRST, "state": "done"}, "9")]
        assert answer.read() in (b"", b"\n"), "it has ended"
    assert [event[1]["collected"] for event in first + more] == list(range(9))
    assert [event[2] for event in first] == [None] * 4 + ["5"]


def test_a_stream_resumes_after_the_last_event_that_it_has(port: int, controller: FakeController) -> None:
    controller.events = [replace(controller.events[0], collected=number) for number in range(5)]
    with stream(port, f"?measurement={FIRST}", last_id=3) as answer:
        assert [event[1]["collected"] for event in events(answer, 2)] == [3, 4]


def test_late_and_early_streams_of_a_measurement_share_a_poller_and_miss_nothing(
    port: int, controller: FakeController
) -> None:
    def add(numbers: range) -> None:
        controller.events += [replace(controller.events[0], collected=number) for number in numbers]

    controller.events = [replace(controller.events[0], collected=0)]
    query = f"?measurement={FIRST}"
    with stream(port, query) as early:
        found = {"early": events(early, 1)}
        add(range(1, 20))
        with stream(port, query) as late, stream(port, query, last_id=7) as resumed:
            add(range(20, 40))
            found["early"] += events(early, 39)
            found |= {"late": events(late, 40), "resumed": events(resumed, 33)}
            before = len(controller.asked)
            assert wait_until(lambda: len(controller.asked) >= before + 10, 10)
            polls = [call for call in controller.asked[before : before + 10] if call[0] == "follow"]
            assert [call[2] for call in polls] == [40] * 10
    assert [event[1]["collected"] for event in found["early"]] == list(range(40))
    assert [event[1]["collected"] for event in found["late"]] == list(range(40))
    assert [event[1]["collected"] for event in found["resumed"]] == list(range(7, 40))


def test_many_streams_ask_the_controller_no_more_than_one(port: int, controller: FakeController) -> None:
    with contextlib.ExitStack() as stack:
        answers = [stack.enter_context(stream(port)) for _ in range(20)]
        for answer in answers:
            events(answer, 1)
        threads = [thread for thread in threading.enumerate() if "AnyIO" in thread.name]
        assert len(threads) <= 45, "streams hold no threads"
        before = controller.asked.count(("status",))
        events(answers[0], 10)
        assert controller.asked.count(("status",)) - before <= 15
    assert wait_until(lambda: quiet(controller), 10), "without a stream nothing is polled"


def quiet(controller: FakeController) -> bool:
    before = len(controller.asked)
    return not wait_until(lambda: len(controller.asked) > before, 0.2)


def test_an_error_of_the_controller_is_an_event_and_the_stream_goes_on(port: int, controller: FakeController) -> None:
    with stream(port) as answer:
        events(answer, 1)
        controller.error = StateFreeError("demo: does not answer")
        while (event := events(answer, 1)[0])[0] == "status":
            pass
        assert event == ("error", {"error": "demo: does not answer"}, None)
        controller.error = None
        while events(answer, 1)[0][0] == "error":
            pass


class StateFreeError(ConfigError):
    pass


def test_a_client_that_does_not_read_is_dropped_and_others_go_on(port: int, controller: FakeController) -> None:
    controller.state = replace(controller.state, warnings=("x" * 100_000,))
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(("127.0.0.1", port))
    slow.settimeout(20)
    with slow, stream(port) as reader:
        slow.sendall(b"GET /v1/events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        events(reader, 3 * QUEUED)
        received = 0
        while part := slow.recv(1 << 20):  # it reads only now, and finds what was sent before it was dropped
            received += len(part)
        assert 0 < received < QUEUED * 100_000, "far less than what the other stream had"
        events(reader, 1)


def test_a_body_that_does_not_come_is_given_up(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as slow:
        slow.sendall(b"POST /v1/drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n{")
        answer = slow.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 408") and b"body: not complete after 0.3 s; send it again" in answer


def test_a_giant_body_is_answered_before_it_was_sent(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as giant:
        giant.sendall(b"POST /v1/drain HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        giant.sendall(b"x" * 65536)
        answer = giant.recv(65536)
    assert answer.startswith(b"HTTP/1.1 413")


def test_what_is_no_http_ends_alone(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), 10) as odd:
        odd.sendall(b"\x16\x03\x01\x02\x00" + bytes(1000))
        assert b"400" in odd.recv(65536)[:20]
    with stream(port) as answer:
        events(answer, 1)


def test_another_interface_is_refused_without_a_token() -> None:
    for host in ("0.0.0.0", "::", "192.0.2.1", "probe.example"):
        with pytest.raises(ConfigError, match=rf"^--host: got '{host}'; other machines reach it; that needs a token$"):
            open_socket(Listen(host), None)
    for host in ("127.0.0.1", "127.0.0.2", "localhost"):
        open_socket(Listen(host), None).close()
    with pytest.raises(ConfigError, match=r"^--host: got '0.0.0.0'; name this machine as browsers call it: --host-na"):
        Listen("0.0.0.0").check()
    found = open_socket(Listen("0.0.0.0", names=("probe.example",)), "token")
    assert found.getsockname()[0] == "0.0.0.0"
    found.close()


def test_hosts_and_url_follow_from_the_address() -> None:
    assert Listen(port=80).hosts == ("localhost", "127.0.0.1") and Listen(port=80).url == "http://127.0.0.1:80/"
    assert Listen("::1", 80).url == "http://[::1]:80/"
    wide = Listen("0.0.0.0", 80, ("Probe.Example",))
    assert wide.hosts == ("localhost", "probe.example") and wide.url == "http://Probe.Example:80/"


def test_an_address_that_cannot_be_had_is_refused_in_one_line() -> None:
    with open_socket(Listen(), None) as held:
        taken = held.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"^--port: got {taken}; another program listens there; choose another$"):
            open_socket(Listen(port=taken), None)
    with pytest.raises(ConfigError, match=r"^--host: got '192.0.2.1'; cannot be listened at \("):
        open_socket(Listen("192.0.2.1"), "token")
    with pytest.raises(ConfigError, match=r"^--host: got 'no such host'; is no address \("):
        open_socket(Listen("no such host"), "token")


def test_the_token_is_made_once_in_a_private_file_that_is_no_link(tmp_path: Path) -> None:
    token = token_in(tmp_path)
    assert len(token) >= 43 and token_in(tmp_path) == token
    path = tmp_path / "http-token"
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    token_in(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_text("")
    assert len(token_in(tmp_path)) >= 43, "an empty token lets nobody in"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text("known")
    with pytest.raises(OSError):
        token_in(tmp_path)


def test_a_server_remembers_its_address_until_it_is_forgotten(tmp_path: Path) -> None:
    assert recorded(tmp_path) is None
    write_record(tmp_path, Listen("127.0.0.1", 4321, ("a",)))
    assert recorded(tmp_path) == Listen("127.0.0.1", 4321, ("a",))
    assert (tmp_path / "http.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "http.json").write_text("{")
    assert recorded(tmp_path) is None
    token_in(tmp_path)
    forget_files(tmp_path)
    assert list(tmp_path.iterdir()) == []
