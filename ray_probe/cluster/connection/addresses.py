"""Addresses of clusters: one has several spellings, as a machine has several names and addresses."""

import ipaddress
import socket

import psutil

from ray_probe.cluster.head.ray_private import HEAD_RESOURCE

HERE = "this machine"


def same_place(one: str, other: str) -> bool:
    """Whether two addresses, host:port, lead to the same port of the same machine, as seen from this one."""
    (host, port), (other_host, other_port) = one.rsplit(":", 1), other.rsplit(":", 1)
    if port != other_port:
        return False
    return host == other_host or not _machines(host).isdisjoint(_machines(other_host))


def connected_address() -> str:
    """host:port of the cluster that this process is connected to: the head's address as its nodes know it."""
    import ray

    address: str = ray.get_runtime_context().gcs_address
    for node in ray.nodes():
        if node["Alive"] and HEAD_RESOURCE in node["Resources"]:
            host = str(node["NodeManagerAddress"])
            return f"[{host}]:{_port(address)}" if ":" in host else f"{host}:{_port(address)}"
    return address


def is_connected_to(address: str) -> bool:
    """Whether this process is connected to the cluster at host:port, however that is spelled."""
    import ray

    here: str = ray.get_runtime_context().gcs_address
    return same_place(address, here) or same_place(address, connected_address())


def is_loopback(host: str) -> bool:
    """Whether a host name or address is this machine's own loopback."""
    return any(ipaddress.ip_address(ip).is_loopback for ip in _resolved(host))


def _port(address: str) -> str:
    return address.rsplit(":", 1)[1]


def _machines(host: str) -> frozenset[str]:
    """IP addresses behind a host name or address, and `HERE` where one of them is this machine's."""
    found = _resolved(host)
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    here = any(ip in own or ipaddress.ip_address(ip).is_loopback for ip in found)
    return frozenset({*found, HERE} if here else found) or frozenset({host.lower()})


def _resolved(host: str) -> set[str]:
    """IP addresses that a host name stands for, an address for itself; none where the name is not known."""
    try:
        answers = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {str(answer[4][0]).partition("%")[0].removeprefix("::ffff:") for answer in answers}
