"""A client over HTTP gets what a client of the controller itself gets, and needs no Ray."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fake_controller import FIRST, FakeController

from ray_probe.errors import (
    CancelledError,
    ClusterError,
    ConfigError,
    MissingError,
    NoClusterError,
    OutputError,
    StateError,
)
from ray_probe.http import client as http_client
from ray_probe.http.app import create_app
from ray_probe.http.client import TOKEN_VARIABLE, HttpController
from ray_probe.http.guard import Access
from ray_probe.http.server import HttpServer, Listen, open_socket
from ray_probe.service.client import ProbeClient

TOKEN = "a-token"
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[FakeController, HttpServer]]:
    controller = FakeController()
    access = Access(TOKEN, frozenset({"localhost", "127.0.0.1"}), writes=1000)
    app = create_app(controller, TOKEN, [], Path("/nowhere"), access=access)
    server = HttpServer(app, open_socket(Listen(), TOKEN)).start()
    yield controller, server
    server.stop()


@pytest.fixture
def controller(server: tuple[FakeController, HttpServer]) -> FakeController:
    server[0].__init__()  # type: ignore[misc]
    return server[0]


@pytest.fixture
def url(server: tuple[FakeController, HttpServer], controller: FakeController) -> str:
    return f"http://127.0.0.1:{server[1].port}/#token={TOKEN}"


@pytest.fixture
def client(url: str) -> Iterator[ProbeClient]:
    with ProbeClient.connect(url) as client:
        yield client


def test_every_query_says_the_same_as_the_controller(client: ProbeClient, controller: FakeController) -> None:
    assert (client.name, client.kind, client.namespace) == ("demo", "service", "ray_probe")
    for name, arguments in [
        ("status", ()), ("results", ()), ("measured", ()), ("measured", (FIRST,)), ("follow", (FIRST, 0)),
        ("beta", ()), ("beta", (4, FIRST)), ("variance", ()), ("variance", (FIRST,)), ("logs", ()),
        ("logs", (FIRST, 1)), ("series", ()), ("scale", (3,)), ("drain", (True,)), ("drain", (False,)),
        ("cancel", (FIRST,)),
    ]:  # fmt: skip
        over_http = getattr(client, name)(*arguments)
        controller.items = FakeController().items if name == "cancel" else controller.items
        direct = getattr(controller, name)(*arguments)
        assert over_http == direct and type(over_http) is type(direct), name


def test_what_is_asked_reaches_the_controller_as_through_ray(client: ProbeClient, controller: FakeController) -> None:
    identity = client.probe("/c/200", against="/c/100", prompts=["x"], settings={"batch.rounds": 2}, snapshot="copy")
    assert identity == "m0004"
    assert ("queue", {
        "model.path": "/c/200", "model.adapter": None, "compare.against": "/c/100", "compare.adapter": None,
        "data.prompts": ["x"], "model.snapshot": "copy", "batch.rounds": 2,
    }) in controller.asked  # fmt: skip
    client.follow(FIRST, sys.maxsize)


@pytest.mark.parametrize(
    "error",
    [ClusterError("demo: no answer"), MissingError("ID: none"), StateError("it drains"), OutputError("disk: full"),
     ConfigError("model.path: wrong")],
)  # fmt: skip
def test_an_error_is_that_of_the_controller(client: ProbeClient, controller: FakeController, error: Any) -> None:
    controller.error = error
    with pytest.raises(type(error)) as raised:
        client.beta()
    assert (type(raised.value), str(raised.value)) == (type(error), str(error))


def test_a_measurement_is_followed_to_its_end(client: ProbeClient, controller: FakeController) -> None:
    controller.events = [replace(controller.events[0], collected=number) for number in range(3)]
    found: list[int] = []

    def listen(progress: Any) -> None:
        found.append(progress.collected)
        if len(found) == 3:
            controller.end(FIRST)

    result = client.ended(FIRST, listen)
    assert found == [0, 1, 2] and result == controller.measured(FIRST)[1]
    controller.end(FIRST, "cancelled")
    with pytest.raises(CancelledError):
        client.wait(FIRST)


@pytest.mark.parametrize("method", ["end", "start_error", "pid"])
def test_what_only_ray_can_do_says_so(client: ProbeClient, method: str) -> None:
    with pytest.raises(ConfigError, match=f"^{method}: works through Ray alone; call it on a node of the service's "):
        getattr(client, method)()


def test_the_token_comes_from_the_argument_the_url_or_the_environment(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = url.partition("#")[0]
    monkeypatch.setenv(TOKEN_VARIABLE, "wrong")
    assert ProbeClient.connect(bare, token=TOKEN).name == ProbeClient.connect(url).name == "demo"
    with pytest.raises(ConfigError, match=r"^RAY_PROBE_TOKEN: the server refuses it; `ray-probe serve` prints the URL"):
        ProbeClient.connect(bare)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)
    assert ProbeClient.connect(bare).name == "demo"
    monkeypatch.delenv(TOKEN_VARIABLE)
    with pytest.raises(ConfigError, match=r"^RAY_PROBE_TOKEN: the server wants a token: set it to the part after"):
        ProbeClient.connect(bare)
    with pytest.raises(ConfigError, match=r"^RAY_PROBE_TOKEN: holds characters that no token has"):
        ProbeClient.connect(bare, token="a\nb")
    with pytest.raises(ConfigError, match=r"^token: belongs to a URL"):
        ProbeClient.connect("127.0.0.1:6379", token="x")


@pytest.mark.parametrize(
    "url",
    ["http://", "http://:80", "http://h:port", "http://user@h", "http://h/?token=x", "http://[::1", "http://h:99999"],
)
def test_a_wrong_url_is_refused_without_showing_its_token(url: str) -> None:
    with pytest.raises(ConfigError, match=r"^--url: got 'http.*; need http://HOST:PORT/#token=TOKEN") as raised:
        HttpController(f"{url}#token=secret")
    assert "secret" not in str(raised.value)


def a_free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        port: int = found.getsockname()[1]
        return port


def test_nothing_at_the_address_is_said_at_once() -> None:
    with pytest.raises(NoClusterError, match=r"^http://127.0.0.1:\d+/: does not answer \(Connection refused\); `ray-p"):
        ProbeClient.connect(f"http://127.0.0.1:{a_free_port()}")


@contextlib.contextmanager
def answering(*answers: bytes) -> Iterator[str]:
    """A server that gives these bytes, a connection each."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        found.settimeout(10)

        def answer() -> None:
            for data in answers:
                connection, _ = found.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(data)

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{found.getsockname()[1]}"
        thread.join(10)


def reply(status: int, body: str, more: str = "") -> bytes:
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n{body}".encode()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"\x00\x01\x02\x03\xff\xfe garbage", r"does not answer \(no HTTP, BadStatusLine\)"),
        (b"", r"does not answer \("),
        (reply(200, "<html>"), r"answers with status 200 and is no server of ray_probe; check the URL"),
        (reply(404, '{"detail": "Not Found"}'), r"answers with status 404 and is no server of ray_probe"),
        (reply(200, '{"name": "demo"}'), r"the server's Status cannot be read \(has no 'kind'\); use the same version"),
    ],
)
def test_another_server_is_recognised(answer: bytes, said: str) -> None:
    with answering(answer) as url, pytest.raises(ClusterError, match=said):
        ProbeClient.connect(url)


def test_a_server_that_is_away_for_a_moment_is_asked_again(
    controller: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_client, "PAUSE_S", 0.0)
    status = reply(200, json.dumps(controller.state.to_json()))
    limited = reply(429, '{"error": "rate"}', "Retry-After: 0\r\n")
    info = reply(202, json.dumps(controller.items[FIRST].to_json()))
    with answering(status, b"", status, b"", limited, info) as url:
        client = ProbeClient.connect(url)
        assert client.status() == controller.state
        assert client.queue({"model.path": "/c"}) == FIRST, "its key makes the repetition safe"
    with answering(status, b"") as url:
        client = ProbeClient.connect(url)
        with pytest.raises(ClusterError, match="does not answer"):
            client.scale(3)


def test_a_server_that_hangs_is_given_up_while_the_caller_is_asked(controller: FakeController) -> None:
    with answering(reply(200, json.dumps(controller.state.to_json()))) as url:
        client = ProbeClient.connect(url)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client._api._port = silent.getsockname()[1]  # type: ignore[union-attr]
        asked: list[int] = []
        with pytest.raises(ClusterError, match="no answer in time; ask again"):
            client.follow(FIRST, 0, deadline_s=0.7, meanwhile=lambda: asked.append(1))
        assert asked

        def stop() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            client.follow(FIRST, 0, deadline_s=20.0, meanwhile=stop)


COMMANDS = """
import sys
from ray_probe.cli import streams
from ray_probe.cli.main import app
from ray_probe.service.client import ProbeClient
streams.prepare()
for arguments in (["status"], ["beta"], ["variance"], ["results"], ["results", "m0003"], ["logs"], ["cancel", "m0003"],
                  ["drain"], ["drain", "--undo"], ["probe", "/c", "--set", "batch.rounds=2"]):
    assert app([*arguments, "--url", URL], standalone_mode=False) in (0, None), arguments
with ProbeClient.connect(URL) as client:
    client.status()
print("imported:", [name for name in ("ray", "torch", "transformers", "fastapi", "uvicorn") if name in sys.modules])
"""


def test_the_command_line_works_by_url_alone_and_imports_no_ray(url: str, controller: FakeController) -> None:
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS.replace("URL", repr(url))], capture_output=True, text=True, timeout=60,
        cwd=ROOT, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert ("queue", {"model.path": "/c", "model.adapter": None, "batch.rounds": 2}) in controller.asked
    assert [call[1] for call in controller.asked if call[0] == "drain"] == [True, False]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--run", "demo"), "--run: got 'demo'; --url names one service already"),
        (("--address", "auto"), "--address: got 'auto'; --url names one service already"),
        (("--namespace", "x"), "--namespace: got 'x'; --url names one service already"),
    ],
)
def test_a_url_excludes_what_finds_a_service_through_ray(arguments: tuple[str, str], said: str) -> None:
    from ray_probe.cli.main import app

    with pytest.raises(ConfigError, match=said):
        app(["status", "--url", "http://127.0.0.1:1", *arguments], standalone_mode=False)
    with pytest.raises(ConfigError, match=r"^--url: got '127.0.0.1:1'; need http://HOST:PORT, as `serve` prints it"):
        app(["status", "--url", "127.0.0.1:1"], standalone_mode=False)
