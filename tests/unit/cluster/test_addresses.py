"""One cluster has several addresses, as a machine has several names."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from ray_probe.cluster.connection import addresses
from ray_probe.cluster.connection.addresses import is_loopback, on_loopback_only, same_place

HOSTS = {"localhost": ["127.0.0.1", "::1"], "trainer": ["10.0.0.5"], "head": ["10.0.0.7"], "head.cluster": ["10.0.0.7"]}


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine is 10.0.0.5, and the names are those of `HOSTS`; no other is known."""

    def resolve(host: str, port: None, **options: object) -> list[tuple[object, ...]]:
        if host not in HOSTS and not host[0].isdigit() and ":" not in host:
            raise socket.gaierror(-2, "Name or service not known")
        return [(0, 0, 0, "", (ip, 0)) for ip in HOSTS.get(host, [host])]

    own = {"lo": [SimpleNamespace(address="127.0.0.1")], "eth0": [SimpleNamespace(address="10.0.0.5"),
           SimpleNamespace(address="fe80::1%eth0")]}  # fmt: skip
    monkeypatch.setattr(addresses.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: own)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("10.0.0.5:6379", "127.0.0.1:6379", True),
        ("10.0.0.5:6379", "localhost:6379", True),
        ("10.0.0.5:6379", "trainer:6379", True),
        ("trainer:6379", "[::1]:6379", True),
        ("10.0.0.5:6379", "[fe80::1]:6379", True),
        ("head:6379", "10.0.0.7:6379", True),
        ("head:6379", "head.cluster:6379", True),
        ("unknown:6379", "unknown:6379", True),
        ("10.0.0.5:6379", "127.0.0.1:6380", False),
        ("10.0.0.7:6379", "127.0.0.1:6379", False),
        ("head:6379", "trainer:6379", False),
        ("unknown:6379", "head:6379", False),
        ("unknown:6379", "other:6379", False),
    ],
)
def test_addresses_are_one_where_they_lead_to_one_port_of_one_machine(one: str, other: str, same: bool) -> None:
    assert same_place(one, other) is same
    assert same_place(other, one) is same


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("[::1]", True), ("10.0.0.5", False), ("head", False), ("x", False)],
)
def test_loopback_is_known_by_name_and_address(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_head_on_loopback_alone_is_known_by_each_of_its_spellings() -> None:
    with socket.create_server(("127.0.0.1", 0)) as private, socket.create_server(("", 0)) as open_to_all:
        port, other = private.getsockname()[1], open_to_all.getsockname()[1]
        assert on_loopback_only(f"127.0.0.1:{port}") and on_loopback_only(f"localhost:{port}")
        assert not on_loopback_only(f"localhost:{other}") and not on_loopback_only(f"10.0.0.5:{port}")
