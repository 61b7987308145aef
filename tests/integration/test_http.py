"""A service over HTTP says what it says through Ray, also after its server was killed."""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from support.served import figures, served
from support.shell import Shell

from ray_probe.errors import ClusterError, ConfigError, InputError, NoClusterError
from ray_probe.service import registry
from ray_probe.service.client import ProbeClient
from ray_probe.system.clock import wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.own_cluster, pytest.mark.timeout(240)]
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


def server_pid() -> int:
    """Of the server's process; this process must be connected."""
    from ray_probe.cluster.http_actor import find_server

    found = find_server("demo", "ray_probe")
    assert found is not None
    return found.pid()


def until(found: Callable[[], Any], seconds: float = 60.0) -> Any:
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


def test_the_server_outlives_a_restart_of_the_controller(over_http: ProbeClient, through_ray: ProbeClient) -> None:
    server, controller = server_pid(), through_ray.pid()
    os.kill(controller, signal.SIGKILL)

    def answers() -> bool:
        with contextlib.suppress(ClusterError):  # 503 meanwhile
            return over_http.status().actors_alive == 1
        return False

    until(answers)
    assert through_ray.pid() != controller and server_pid() == server


def test_a_service_is_served_once_stopped_and_served_anew(shell: Shell, url: str) -> None:
    assert shell.ask("serve")["url"] == url, "the server that there is"
    port = urlsplit(url).port
    assert registry_url(shell) == f"http://127.0.0.1:{port}/"
    assert f"it is served at http://127.0.0.1:{port}/ already" in shell.run("serve", "--port", "1", code=2)
    directory = Path(shell.ask("status", "--url", url)["directory"])
    assert (directory / "http-token").stat().st_mode & 0o777 == 0o600
    assert shell.ask("serve", "--stop") == {"name": "demo", "stopped": True}
    assert registry_url(shell) is None and not (directory / "http-token").exists()
    with pytest.raises(NoClusterError):
        ProbeClient.connect(url)
    again = shell.ask("serve", "--port", port)["url"]
    assert again.partition("#")[0] == url.partition("#")[0] and again != url, "another token"
    with pytest.raises(ConfigError, match="the server refuses it"):
        ProbeClient.connect(url)
    assert shell.ask("serve", "--stop")["stopped"] and not shell.ask("serve", "--stop")["stopped"]


def registry_url(shell: Shell) -> str | None:
    before = os.environ.get("XDG_STATE_HOME")
    os.environ["XDG_STATE_HOME"] = str(shell.home / "state")
    try:
        found = registry.read("demo")
        assert found is not None
        return found.url
    finally:
        os.environ.pop("XDG_STATE_HOME")
        os.environ.update({} if before is None else {"XDG_STATE_HOME": before})


def test_down_ends_the_server(shell: Shell, url: str) -> None:
    served = shell.ask("serve")["url"]
    assert ProbeClient.connect(served).name == "demo"
    shell.run("down", "--run", "demo")

    def is_gone() -> bool:
        try:
            ProbeClient.connect(served)
        except NoClusterError:
            return True
        return False

    until(is_gone, 10)
