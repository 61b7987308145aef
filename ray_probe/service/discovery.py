"""Finds the controller of a service or run by its name, on any cluster."""

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_probe.cluster.connection.addresses import connected_address, find_address, is_connected_to, same_place
from ray_probe.cluster.connection.connect import connected
from ray_probe.cluster.head.head_monitor import LOST_S, OWN_LOST_S, HeadMonitor
from ray_probe.errors import ClusterError, ConfigError, bad_value
from ray_probe.service import registry

if TYPE_CHECKING:
    from ray_probe.cluster.controller_handle import ControllerHandle


@dataclass(frozen=True)
class Found:
    """A service or run that was found.

    Attributes:
        controller: its actor.
        namespace: Ray namespace of its actors.
        kind: service or run.
        head: monitor of its cluster's head.
    """

    controller: "ControllerHandle"
    namespace: str
    kind: str
    head: HeadMonitor


def find(
    stack: contextlib.ExitStack, address: str | None, namespace: str | None, name: str | None, kind: str | None
) -> Found:
    """Joins the cluster of a service or run and finds its controller.

    Args:
        stack: ends the connection, where this process was not connected.
        address: host:port of the cluster, or auto; None: from this user's registry.
        namespace: Ray namespace; None: the registry's, or `ray_probe` with an address.
        name: of the service or run; None: the only one.
        kind: service or run, to choose without a name; None: either.

    Raises:
        ConfigError: no such service or run, or several; names those that exist.
        ClusterError: the cluster is unreachable, refuses the token, or is not the connected one.
    """
    if address is None:
        entry = registry.choose(name, kind)
        namespace, name = namespace or entry.namespace, entry.name
        _join_entry(stack, entry, namespace)
        known: registry.Entry | None = entry
    else:
        namespace, known = namespace or "ray_probe", entry_at(address, name)
        token_path, loopback = (known.token_path, known.loopback) if known else (None, False)
        join(stack, address, namespace, token_path, loopback)
    controller = choose_controller(name, namespace, kind)
    head = HeadMonitor(connected_address(), OWN_LOST_S if known is not None and known.loopback else LOST_S)
    registered = known is not None and known.name == controller.name and known.namespace == namespace
    found = known.kind if known is not None and registered else controller.ask_kind()
    return Found(controller, namespace, found or "service", head)


def join(stack: contextlib.ExitStack, address: str, namespace: str, token_path: str | None, loopback: bool) -> None:
    """Connects this process to a cluster unless it is connected."""
    if not is_connected():
        stack.enter_context(
            connected(address, namespace, None, token_path=token_path, loopback=loopback, log=lambda text: None)
        )
    elif address != "auto" and not is_connected_to(find_address(address)):
        remedy = f"this process is connected to the Ray cluster at {connected_address()}, and it can have only one"
        remedy += " connection; ask from another process, for example with `ray-probe COMMAND --json`"
        raise ClusterError(bad_value("address", address, remedy))


def is_connected() -> bool:
    """Returns whether this process is connected to a Ray cluster."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def entry_at(address: str, name: str | None) -> registry.Entry | None:
    """Returns an entry at an address, preferably of that name, or None.

    Args:
        address: host:port in any spelling, or auto.
        name: of the service or run.
    """
    found = connected_address() if address == "auto" and is_connected() else find_address(address)
    there = [entry for entry in registry.entries() if same_place(entry.address, found)]
    return next((entry for entry in there if entry.name == name), there[0] if there else None)


def choose_controller(name: str | None, namespace: str, kind: str | None = None) -> "ControllerHandle":
    """Returns a controller of the connected cluster.

    Args:
        name: of a service or run; None: the only one.
        namespace: Ray namespace of its actors.
        kind: service or run, to choose without a name; None: either.

    Raises:
        ConfigError: no such service or run, or several; names those that exist.
    """
    from ray_probe.cluster.controllers import controllers

    there = controllers(namespace)
    fitting = [name] if name is not None else list(there)
    if name is None and kind is not None:
        kinds = {one: controller.ask_kind() for one, controller in there.items()}  # None: it does not answer
        fitting = [one for one in there if kinds[one] == kind] or [one for one in there if kinds[one] is None]
    if len(fitting) == 1 and fitting[0] in there:
        return there[fitting[0]]
    remedy = f"the namespace {namespace!r} has {', '.join(there) or 'none'}"
    raise ConfigError(bad_value("--run", name, f"choose a {kind or 'service or run'} that is up; {remedy}"))


def _join_entry(stack: contextlib.ExitStack, entry: registry.Entry, namespace: str) -> None:
    try:
        join(stack, entry.address, namespace, entry.token_path, entry.loopback)
    except ClusterError as error:
        if not entry.loopback or entry.kind == "run" or is_connected():
            raise
        remedy = f"`down --run {entry.name}`, then `up CONFIG --name {entry.name}` resumes its measurements"
        raise ClusterError(f"the head of {entry.name!r} does not answer; {remedy} ({error})") from None
