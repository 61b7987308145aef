"""The program and the address that are called when a measurement ends."""

import json
import shlex
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.services import until

from ray_probe.config.reporting import NotifyConfig
from ray_probe.notify.notifier import Ending, Notifier

SAVES = """
import json, os, sys
names = ("RAY_PROBE_RESULT", "RAY_PROBE_DIRECTORY", "RAY_PROBE_STATE")
json.dump({"result": json.load(sys.stdin), **{name: os.environ[name] for name in names}}, open(sys.argv[1], "w"))
"""


def python(code: str, *arguments: object) -> str:
    """The text of a command that runs this code."""
    return shlex.join([sys.executable, "-c", code, *map(str, arguments)])


def an_ending(directory: Path, state: str = "done", result: dict[str, Any] | None = None) -> Ending:
    return Ending(state, directory, {"id": "m0003", "state": state}, result)


def notified(config: NotifyConfig, ending: Ending, times: int = 1, **seconds: float) -> list[str]:
    """The warnings of a notifier that has done its work."""
    warnings: list[str] = []
    notifier = Notifier(config, warnings.append, **seconds)
    for _ in range(times):
        notifier.notify(lambda: ending)
    until(lambda: notifier.idle)
    return warnings


def test_a_program_gets_the_result_on_stdin_and_the_place_in_its_environment(tmp_path: Path):
    config = NotifyConfig(command=python(SAVES, tmp_path / "with a space.json"))
    assert notified(config, an_ending(tmp_path, result={"entropy": {"per_sequence": 1.5}})) == []
    assert json.loads((tmp_path / "with a space.json").read_text()) == {
        "result": {"entropy": {"per_sequence": 1.5}}, "RAY_PROBE_RESULT": str(tmp_path / "result.json"),
        "RAY_PROBE_DIRECTORY": str(tmp_path), "RAY_PROBE_STATE": "done",
    }  # fmt: skip


def test_without_a_result_it_gets_null_and_no_file(tmp_path: Path):
    assert notified(NotifyConfig(command=python(SAVES, tmp_path / "x")), an_ending(tmp_path, "failed")) == []
    found = json.loads((tmp_path / "x").read_text())
    assert (found["result"], found["RAY_PROBE_RESULT"], found["RAY_PROBE_STATE"]) == (None, "", "failed")


def test_no_shell_reads_the_command_unless_it_names_one(tmp_path: Path):
    code = "import sys; open(sys.argv[1], 'w').write(' '.join(sys.argv[2:]))"
    notified(NotifyConfig(command=python(code, tmp_path / "plain") + " $HOME; touch more"), an_ending(tmp_path))
    assert (tmp_path / "plain").read_text() == "$HOME; touch more"
    notified(NotifyConfig(command=f"sh -c 'echo $RAY_PROBE_STATE > {tmp_path / 'shell'}'"), an_ending(tmp_path))
    assert (tmp_path / "shell").read_text() == "done\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("/no/such/program", "No such file or directory: '/no/such/program'"),
        (python("import sys; sys.exit('it went wrong')"), "exit code 1: it went wrong"),
        (python("import threading; threading.Event().wait(60)"), "took more than 0.5 s and was ended"),
    ],
)
def test_a_program_that_fails_or_takes_too_long_is_one_warning_a_measurement(
    tmp_path: Path, command: str, said: str
):
    warnings = notified(NotifyConfig(command=command), an_ending(tmp_path), times=2, command_s=0.5)
    assert len(warnings) == 2 and all(said in text and "m0003: notify.command" in text for text in warnings), warnings


class Server(ThreadingHTTPServer):
    """Keeps what is posted; answers with these codes, then with 200."""

    def __init__(self, *codes: int) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.codes, self.got, self.silent = list(codes), [], threading.Event()
        self.hangs = False
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook?key=secret"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((self.path, self.headers["Content-Type"], json.loads(body)))
        if self.server.hangs:
            self.server.silent.wait(30.0)
        self.send_response(self.server.codes.pop(0) if self.server.codes else 200)
        self.end_headers()

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.silent.set()
    made.shutdown()
    made.server_close()


def test_an_address_gets_the_measurement_and_its_result(server: Server, tmp_path: Path):
    assert notified(NotifyConfig(webhook=server.address), an_ending(tmp_path, result={"counts": {}})) == []
    posted = {"info": {"id": "m0003", "state": "done"}, "result": {"counts": {}}}
    assert server.got == [("/hook?key=secret", "application/json", posted)]


def test_a_server_error_is_tried_twice_again_and_a_refusal_is_not(server: Server, tmp_path: Path):
    server.codes[:] = [500, 503]
    assert notified(NotifyConfig(webhook=server.address), an_ending(tmp_path)) == []
    assert len(server.got) == 3
    server.codes[:] = [404]
    (warning,) = notified(NotifyConfig(webhook=server.address), an_ending(tmp_path))
    assert len(server.got) == 4 and "notify.webhook: answered 404" in warning and "secret" not in warning


def test_an_address_that_is_silent_or_not_there_is_one_warning(server: Server, tmp_path: Path):
    server.hangs = True
    (warning,) = notified(NotifyConfig(webhook=server.address), an_ending(tmp_path), webhook_s=0.2)
    assert len(server.got) == 3 and "notify.webhook: timed out" in warning
    address = server.address
    server.silent.set()
    server.shutdown()
    server.server_close()
    both = NotifyConfig(webhook=address, command="/no/such/program")
    (warning,) = notified(both, an_ending(tmp_path))
    assert "notify.command" in warning and "Connection refused" in warning and "secret" not in warning


def test_nothing_is_called_where_nothing_is_configured(tmp_path: Path):
    notifier = Notifier(NotifyConfig(), print)
    notifier.notify(lambda: pytest.fail("nobody is to be notified"))
    assert notifier.idle
