"""Where a web server may be asked to listen, what is printed of it, and its place in the registry."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ray_probe.cli.main import app
from ray_probe.errors import ConfigError
from ray_probe.http.server import Listen
from ray_probe.service import registry, serving
from ray_probe.service.serving import Asked, Served


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    yield tmp_path


def test_a_missing_extra_is_said_before_anything_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^http: fastapi and uvicorn missing; pip install 'ray-probe\[http\]'$"):
        Asked().check()
    with pytest.raises(ConfigError, match="pip install"):
        app(["serve"], standalone_mode=False)
    with pytest.raises(ConfigError, match="pip install"):
        app(["up", "no.yaml", "--http"], standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["up", "no.yaml", "--port", "1"], "--http: missing; --port, --host and --host-name belong to it"),
        (["up", "no.yaml", "--http", "--host", "0.0.0.0"], "--host: got '0.0.0.0'; name this machine as browsers"),
        (["serve", "--host", "::"], "--host: got '::'; name this machine as browsers call it: --host-name NAME"),
        (["serve", "--stop", "--port", "1"], "--stop: got True; it takes no address"),
        (["serve", "--run", "demo"], "--run: got 'demo'; nothing of that name is up"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(arguments: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        app(arguments, standalone_mode=False)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize(
    ("asked", "met"),
    [
        (Asked(), True), (Asked("127.0.0.1", 4321), True), (Asked(port=0), True), (Asked(names=("a",)), True),
        (Asked("127.0.0.2"), False), (Asked(port=4322), False), (Asked(names=("a", "b")), False),
    ],
)  # fmt: skip
def test_a_server_that_listens_as_asked_is_taken(asked: Asked, met: bool) -> None:
    assert asked.is_met_by(Listen("127.0.0.1", 4321, ("a",))) is met


def test_the_url_has_the_token_in_its_fragment_and_the_way_from_another_machine() -> None:
    served = Served("demo", Listen(port=4321), "secret", "/runs/demo/http-token")
    assert served.lines() == [
        "http://127.0.0.1:4321/#token=secret",
        "from another machine: ssh -L 4321:127.0.0.1:4321 HEAD, then the same URL there",
    ]
    unread = replace(served, token=None)
    assert unread.lines()[:2] == [
        "http://127.0.0.1:4321/",
        "token: in /runs/demo/http-token on the head; add #token=TOKEN to the URL",
    ]
    wide = replace(served, listen=Listen("10.0.0.5", 4321, ("probe.example",)))
    assert wide.lines() == [
        "http://probe.example:4321/#token=secret",
        "the token travels unencrypted: use it in a private network, or behind a proxy with TLS",
    ]


def test_the_registry_knows_the_url_and_its_owner_still_unlists_the_entry() -> None:
    entry = registry.Entry("demo", "run", "127.0.0.1:1", "ray_probe", None, False, "/runs/demo", "now")
    registry.register(entry)
    registry.set_url("demo", "http://127.0.0.1:4321/")
    found = registry.read("demo")
    assert found == replace(entry, url="http://127.0.0.1:4321/")
    registry.set_url("other", "http://127.0.0.1:4321/")
    assert registry.read("other") is None
    registry.forget(entry)
    assert registry.read("demo") is None
