"""From the name of what is live to the actor that answers for it, on the cluster that this process joins."""

import contextlib
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_probe.errors import ClusterError, ConfigError, bad_value
from ray_probe.service import registry

if TYPE_CHECKING:
    from ray_probe.cluster.controller_actor import ControllerHandle
    from ray_probe.cluster.head.head_monitor import HeadMonitor


@dataclass(frozen=True)
class Found:
    """A service or run that answers: its controller, name, namespace and kind, and a watch of its cluster's head."""

    controller: "ControllerHandle"
    name: str
    namespace: str
    kind: str
    head: "HeadMonitor"


def find(
    stack: contextlib.ExitStack, address: str | None, namespace: str | None, name: str | None, kind: str | None
) -> Found:
    """Connect this process to the cluster of what is meant, unless it is connected, for as long as the stack lasts.

    Args:
        stack: ends the connection.
        address: host:port of the cluster, or auto; None: where this user's registry says.
        namespace: Ray namespace; None: the registry's, or `ray_probe` with an address.
        name: of the service or run; None where there is only one.
        kind: of what is looked for without a name: service or run; None: either.

    Raises:
        ConfigError: nothing of that name, or several without one; names what there is.
        ClusterError: the cluster is not reachable, refuses the token, or is not the one that this process has joined.
    """
    from ray_probe.cluster.connection.addresses import connected_address
    from ray_probe.cluster.head.head_monitor import LOST_S, OWN_LOST_S, HeadMonitor

    if address is None:
        entry = registry.choose(name, kind)
        namespace, name = namespace or entry.namespace, entry.name
        _join_entry(stack, entry, namespace)
        known: registry.Entry | None = entry
    else:
        namespace, known = namespace or "ray_probe", entry_at(address, name)
        token_path, loopback = (known.token_path, known.loopback) if known else (None, False)
        join(stack, address, namespace, token_path, loopback)
    controller, name = choose_controller(name, namespace, kind)
    head = HeadMonitor(connected_address(), OWN_LOST_S if known is not None and known.loopback else LOST_S)
    registered = known is not None and known.name == name and known.namespace == namespace
    found = known.kind if known is not None and registered else controller.kind()
    return Found(controller, name, namespace, found or "service", head)


def join(stack: contextlib.ExitStack, address: str, namespace: str, token_path: str | None, loopback: bool) -> None:
    """Connect this process to the cluster, unless it is."""
    from ray_probe.cluster.connection.addresses import connected_address, is_connected_to
    from ray_probe.cluster.connection.connect import connected
    from ray_probe.cluster.connection.join_check import find_address

    if not is_connected():
        stack.enter_context(
            connected(address, namespace, None, token_path=token_path, loopback=loopback, log=lambda text: None)
        )
    elif address != "auto" and not is_connected_to(find_address(address)):
        remedy = f"this process is connected to the Ray cluster at {connected_address()}, and it can have only one"
        remedy += " connection; ask from another process, with `ray-probe COMMAND --json` say"
        raise ClusterError(bad_value("address", address, remedy))


def is_connected() -> bool:
    """Whether this process is connected to a Ray cluster; nothing is imported for that."""
    ray: Any = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def entry_at(address: str, name: str | None) -> registry.Entry | None:
    """An entry of this user's at an address (host:port or auto), however that is spelled; that of the name first."""
    from ray_probe.cluster.connection.addresses import connected_address, same_place
    from ray_probe.cluster.connection.join_check import find_address

    found = connected_address() if address == "auto" and is_connected() else find_address(address)
    there = [entry for entry in registry.entries() if same_place(entry.address, found)]
    return next((entry for entry in there if entry.name == name), there[0] if there else None)


def choose_controller(name: str | None, namespace: str, kind: str | None = None) -> "tuple[ControllerHandle, str]":
    """The controller that is meant, on the cluster that this process is connected to, and its name.

    Args:
        name: of a service or run; None: the only one there is.
        namespace: Ray namespace of its actors.
        kind: of what is looked for without a name, service or run; None: either.

    Raises:
        ConfigError: nothing is up, or several are and none is named; names what there is.
    """
    from ray_probe.cluster.controllers import controllers

    there = controllers(namespace)
    fitting = [name] if name is not None else list(there)
    if name is None and kind is not None:
        kinds = {one: controller.kind() for one, controller in there.items()}  # None: it is being restarted, say
        fitting = [one for one in there if kinds[one] == kind] or [one for one in there if kinds[one] is None]
    if len(fitting) == 1 and fitting[0] in there:
        return there[fitting[0]], fitting[0]
    remedy = f"the namespace {namespace!r} has {', '.join(there) or 'none'}"
    raise ConfigError(bad_value("--run", name, f"choose a {kind or 'service or run'} that is up; {remedy}"))


def _join_entry(stack: contextlib.ExitStack, entry: registry.Entry, namespace: str) -> None:
    try:
        join(stack, entry.address, namespace, entry.token_path, entry.loopback)
    except ClusterError as error:
        if not entry.loopback or entry.kind == "run" or is_connected():
            raise
        remedy = f"`down --run {entry.name}`, then `up CONFIG --name {entry.name}` goes on with what it had"
        raise ClusterError(f"the head of {entry.name!r} does not answer; {remedy} ({error})") from None
