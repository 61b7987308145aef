"""A service over HTTP says what it says through Ray, also after its server was killed."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.served import figures, served, server_pid
from support.shell import Shell

from ray_probe.errors import ConfigError, InputError, NoClusterError
from ray_probe.service import registry
from ray_probe.service.client import ProbeClient
from ray_probe.system.clock import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(500)]
ROUNDS = 6


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


@pytest.fixture
def through_ray(shell: Shell, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProbeClient]:
    monkeypatch.setenv("XDG_STATE_HOME", str(shell.home / "state"))
    with ProbeClient.connect() as client:
        yield client


@pytest.fixture
def over_http(url: str) -> Iterator[ProbeClient]:
    with ProbeClient.connect(url) as client:
        yield client


def until(found: Callable[[], Any], seconds: float = 150.0) -> Any:
    value = wait_until(found, seconds, 0.05)
    assert value, "it did not come to that in time"
    return value


def test_queries_say_the_same_over_http_and_through_ray(
    over_http: ProbeClient, through_ray: ProbeClient, shell: Shell
) -> None:
    identity = over_http.probe(shell.home / "model")
    events: list[Any] = []
    result = over_http.ended(identity, events.append)
    assert [event.round for event in events if event.rounds][-1] == ROUNDS - 1
    assert result == through_ray.measured(identity)[1] and result.counts.rounds == ROUNDS
    for name, arguments in [
        ("results", ()), ("measured", ()), ("measured", (identity,)), ("beta", ()), ("beta", (2, identity)),
        ("variance", ()), ("follow", (identity, 0)), ("logs", ()), ("logs", (identity, 5)), ("scale", (1,)),
    ]:  # fmt: skip
        assert getattr(over_http, name)(*arguments) == getattr(through_ray, name)(*arguments), name
    still = [replace(client.status(), free={}) for client in (over_http, through_ray)]
    assert still[0] == still[1]
    for name, arguments in [("beta", (99,)), ("measured", ("m0099",)), ("cancel", (identity,)), ("scale", (0,)),
                            ("probe", ("/nowhere",))]:  # fmt: skip
        said = []
        for client in (over_http, through_ray):
            with pytest.raises(InputError) as refused:
                getattr(client, name)(*arguments)
            said.append((refused.value.exit_code, str(refused.value)))
        if name != "scale":  # the body is checked before the controller is asked
            assert said[0] == said[1], name


def test_the_command_line_works_by_url_alone(url: str, tmp_path: Path) -> None:
    bare, _, token = url.partition("#token=")
    laptop = Shell(tmp_path, RAY_PROBE_TOKEN=token)  # no registry, no Ray
    assert laptop.ask("status", "--url", bare)["name"] == "demo"
    assert laptop.ask("results", "--url", bare)[0]["state"] == "done"
    assert laptop.ask("beta", "--url", bare)["version"] == ROUNDS
    laptop.run("report", "--url", url, "-o", "x.html")
    report = (tmp_path / "x.html").read_text(encoding="utf-8")
    assert "m0001" in report and token not in report
    assert "the server refuses it" in Shell(tmp_path, RAY_PROBE_TOKEN="x").run("status", "--url", bare, code=2)
    assert "no such measurement" in laptop.run("results", "m0099", "--url", bare, code=2)


def test_a_killed_server_is_back_on_its_port_and_the_measurement_has_the_same_bits(
    over_http: ProbeClient, through_ray: ProbeClient, shell: Shell
) -> None:
    identity = over_http.probe(shell.home / "model")
    until(lambda: through_ray.measured(identity)[0].rounds)
    before = server_pid()
    os.kill(before, signal.SIGKILL)
    result = over_http.wait(identity)
    assert server_pid() != before
    _, undisturbed = over_http.result("m0001")
    assert undisturbed is not None and figures(result) == figures(undisturbed)
    assert [item.state for item in over_http.results()] == ["done", "done"]


def test_a_service_is_served_once_and_anew_with_another_token_until_down(
    shell: Shell, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(shell.home / "state"))
    port, directory = urlsplit(url).port, shell.home / "runs" / "demo"
    assert (directory / "http-token").stat().st_mode & 0o777 == 0o600
    entry = registry.read("demo")
    assert entry is not None and entry.url == f"http://127.0.0.1:{port}/"
    assert f"it is served at http://127.0.0.1:{port}/ already" in shell.run("serve", "--port", "1", code=2)
    assert shell.ask("serve", "--stop") == {"name": "demo", "stopped": True}
    entry = registry.read("demo")
    assert entry is not None and entry.url is None and not (directory / "http-token").exists()
    with pytest.raises(NoClusterError):
        ProbeClient.connect(url)
    anew = shell.ask("serve", "--port", port)["url"]
    assert anew.partition("#")[0] == url.partition("#")[0] and ProbeClient.connect(anew).name == "demo"
    with pytest.raises(ConfigError, match="the server refuses it"):
        ProbeClient.connect(url)
    shell.run("down", "--run", "demo")

    def is_gone() -> bool:
        try:
            ProbeClient.connect(anew)
        except NoClusterError:
            return True
        return False

    until(is_gone, 10)
