"""`down` removes the entries of services known to be gone, and no others."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ray_probe.cluster.head import local_head
from ray_probe.errors import ClusterError, ConfigError, NoClusterError
from ray_probe.service import discovery, ending, lifecycle, registry
from ray_probe.service.client import ProbeClient
from ray_probe.service.registry import Entry
from ray_probe.system import processes

REFUSED = "cluster.address: got '10.0.0.1:6379'; the cluster refused the token"


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "ray_probe"


def an_entry(name: str = "demo", **fields: Any) -> Entry:
    given: dict[str, Any] = {
        "kind": "service", "address": "10.0.0.1:6379", "namespace": "ray_probe", "token_path": None, "loopback": False,
        "directory": f"/runs/{name}", "started": "2026-05-01T12:00:00+00:00",
    }  # fmt: skip
    entry = Entry(name, **(given | fields))
    registry.register(entry)
    return entry


def its_own_head(name: str = "demo", **fields: Any) -> Entry:
    mine = {"pid": os.getpid(), "pid_created": processes.created(os.getpid())}
    return an_entry(name, **({"address": "127.0.0.1:7000", "loopback": True} | mine | fields))


@pytest.fixture
def joining(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], None]:
    """Lets a cluster be joined never, by this error."""

    def fails(error: Exception) -> None:
        @contextmanager
        def refuse(*args: Any, **named: Any) -> Iterator[None]:
            raise error
            yield

        monkeypatch.setattr(ending, "connected", refuse)

    return fails


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> list[Entry]:
    """The services whose actors were ended; that works."""
    found: list[Entry] = []
    monkeypatch.setattr(ending, "_ended", lambda entry, tell: found.append(entry))
    monkeypatch.setattr(local_head, "end", lambda pid, created: True)
    return found


def listed() -> list[str]:
    return [path.stem for path in sorted(registry.place().glob("*.json"))]


def test_a_service_whose_cluster_refuses_the_token_stays_listed(joining: Callable[[Exception], None]) -> None:
    entry = an_entry()
    joining(ClusterError(REFUSED))
    with pytest.raises(ClusterError) as refused:
        ending.down("demo", print)
    assert str(refused.value) == f"{REFUSED}; 'demo' may be up, and stays listed (in {entry.file})"
    assert listed() == ["demo"]


def test_a_service_whose_cluster_is_gone_is_unlisted(joining: Callable[[Exception], None]) -> None:
    an_entry()
    joining(NoClusterError("nobody answers"))
    with pytest.raises(ClusterError, match=r"^nobody answers; 'demo' is gone with its cluster, and no longer listed"):
        ending.down("demo", print)
    assert listed() == []


def test_a_service_ended_by_its_address_is_unlisted_however_that_is_spelled(ended: list[Entry]) -> None:
    own = its_own_head()
    an_entry("other", address="127.0.0.1:6401")
    assert ending.down("demo", print, "localhost:7000") == "demo"
    assert ended == [own], "its token and its head are known"
    assert listed() == ["other"]
    ending.down("other", print, "localhost:6402")
    assert listed() == ["other"], "what was ended is on another cluster"
    ending.down("other", print, "localhost:6401", "elsewhere")
    assert listed() == ["other"], "what was ended is in another namespace"
    ending.down("other", print, "localhost:6401")
    assert listed() == []


def test_without_a_name_a_run_beside_a_service_is_not_meant(ended: list[Entry]) -> None:
    its_own_head("mine", kind="run")
    with pytest.raises(ConfigError, match=r"no service is up; start one: .*--run NAME chooses among mine \(run\)"):
        ending.down(None, print)
    its_own_head()
    assert ending.down(None, print) == "demo"
    assert listed() == ["mine"]
    with pytest.raises(ConfigError, match=r"--run: got 'mine'; it is a run, process \d+; end it with Ctrl-C there"):
        ending.down("mine", print)
    assert listed() == ["mine"] and [entry.name for entry in ended] == ["demo"]


def test_a_service_that_has_lost_its_head_can_be_taken_off_with_and_without_its_name(ended: list[Entry]) -> None:
    for name in ("demo", None):
        its_own_head(pid_created=0.0)
        assert ending.down(name, print) == "demo"
        assert listed() == []
    assert ended == []


def test_a_head_of_another_machine_is_not_ended_from_here(ended: list[Entry]) -> None:
    its_own_head(host="elsewhere")
    with pytest.raises(ConfigError, match=r"its head is on elsewhere alone; call `down` there"):
        ending.down("demo", print)
    assert ended == [] and listed() == ["demo"]


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (NoClusterError("nobody answers"), True),
        (ConfigError("--run: got 'demo'; the namespace has none"), True),
        (ClusterError(REFUSED), False),
    ],
)
def test_a_name_is_free_again_only_where_its_service_is_known_to_be_gone(
    monkeypatch: pytest.MonkeyPatch, error: Exception, free: bool
) -> None:
    an_entry()

    def connect(*args: Any) -> Any:
        raise error

    monkeypatch.setattr(ProbeClient, "connect", connect)
    if free:
        lifecycle.refuse_live_name("demo")
        return
    with pytest.raises(ClusterError, match=r"listed as up on 10\.0\.0\.1:6379, and cannot be asked; choose another"):
        lifecycle.refuse_live_name("demo")


def test_a_run_and_a_head_that_answer_to_a_spelling_of_their_address_are_found_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ray_probe.service.discovery import entry_at

    own, run = its_own_head(), an_entry("mine", kind="run", address="127.0.0.1:7000")
    assert entry_at("localhost:7000", "demo") == own and entry_at("127.0.0.1:7000", "mine") == run
    assert entry_at("127.0.0.1:7001", "demo") is None
    monkeypatch.setattr(discovery, "find_address", lambda address: "127.0.0.1:7000")
    assert entry_at("auto", "mine") == run
