"""Addresses of clusters; one cluster has several, as a machine has several names."""

import ipaddress
import os
import re
import socket
from pathlib import Path

import psutil

from ray_probe.cluster.head.ray_private import ADDRESS_NOTE, HEAD_RESOURCE
from ray_probe.errors import ClusterError, ConfigError, bad_value

HERE = "this machine"


def find_address(address: str) -> str:
    """Returns the host:port behind `auto`, or `address` itself.

    Raises:
        ClusterError: `auto` finds nothing.
        ConfigError: it is not host:port.
    """
    found = address
    if address == "auto":
        # Ray would also search the machine's processes, and find private clusters that nobody meant.
        note = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray", ADDRESS_NOTE)
        found = os.environ.get("RAY_ADDRESS") or (note.read_text().strip() if note.is_file() else "auto")
        if found == "auto":
            remedy = f"there is neither RAY_ADDRESS nor {note}; give host:port, or null to start Ray here"
            raise ClusterError(bad_value("cluster.address", address, remedy))
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):(\d{1,5})", found)
    if not match or not 0 < int(match[2]) < 65536:
        raise ConfigError(bad_value("cluster.address", found, "use null, auto or host:port"))
    return found


def same_place(one: str, other: str) -> bool:
    """Returns whether two addresses, host:port, lead to the same port of one machine."""
    (host, port), (other_host, other_port) = one.rsplit(":", 1), other.rsplit(":", 1)
    if port != other_port:
        return False
    return host == other_host or not _machines(host).isdisjoint(_machines(other_host))


def connected_address() -> str:
    """Returns host:port of the connected cluster's head as its nodes know it."""
    import ray

    address: str = ray.get_runtime_context().gcs_address
    for node in ray.nodes():
        if node["Alive"] and HEAD_RESOURCE in node["Resources"]:
            host, port = str(node["NodeManagerAddress"]), address.rsplit(":", 1)[1]
            return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return address


def is_connected_to(address: str) -> bool:
    """Returns whether this process is connected to the cluster at host:port."""
    import ray

    here: str = ray.get_runtime_context().gcs_address
    return same_place(address, here) or same_place(address, connected_address())


def is_loopback(host: str) -> bool:
    """Returns whether a host name or address is this machine's loopback."""
    return any(ipaddress.ip_address(ip).is_loopback for ip in _resolved(host))


def on_loopback_only(address: str) -> bool:
    """Returns whether the listener at host:port is here and on loopback only."""
    host, port = address.rsplit(":", 1)
    if not is_loopback(host):
        return False
    places = [c.laddr for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr]
    at_port = [place.ip for place in places if place.port == int(port)]
    return bool(at_port) and all(ip.removeprefix("::ffff:").startswith("127.") for ip in at_port)


def _machines(host: str) -> frozenset[str]:
    """Returns the IP addresses of a host, with `HERE` where one is this machine's."""
    found = _resolved(host)
    own = {entry.address.partition("%")[0] for entries in psutil.net_if_addrs().values() for entry in entries}
    here = any(ip in own or ipaddress.ip_address(ip).is_loopback for ip in found)
    return frozenset({*found, HERE} if here else found) or frozenset({host.lower()})


def _resolved(host: str) -> set[str]:
    """Returns the IP addresses of a host name, or of an address itself."""
    try:
        answers = socket.getaddrinfo(host.strip("[]"), None, type=socket.SOCK_STREAM)
    except OSError:
        return set()
    return {str(answer[4][0]).partition("%")[0].removeprefix("::ffff:") for answer in answers}
