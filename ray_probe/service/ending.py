"""Ends a service for `down`, and removes its entry in the registry."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from ray_probe.cluster.connection.connect import connected
from ray_probe.cluster.head import local_head
from ray_probe.cluster.head.environment import PREFIX
from ray_probe.errors import ClusterError, ConfigError, NoClusterError, bad_value
from ray_probe.service import registry
from ray_probe.service.client import ProbeClient
from ray_probe.service.discovery import entry_at
from ray_probe.system.clock import utc_now

Tell = Callable[[str], None]


def down(name: str | None, tell: Tell, address: str | None = None, namespace: str | None = None) -> str:
    """Ends a service, its actors and its own head; returns its name.

    Args:
        name: of the service; None: the only one.
        tell: receives messages.
        address: of its cluster; a head of another user's service stays.
        namespace: Ray namespace; None: the registry's, or `ray_probe`.

    Raises:
        ConfigError: no service has that name, or it is a run.
        ClusterError: a service without its own head is unreachable. It stays listed unless its cluster is gone.
    """
    entry = _meant(name) if address is None else _at(address, name, namespace)
    if entry.kind != "service":
        raise ConfigError(bad_value("--run", entry.name, f"it is a run, process {entry.pid}; end it with Ctrl-C there"))
    if not entry.is_of_this_host and entry.loopback:
        raise ConfigError(bad_value("--run", entry.name, f"its head is on {entry.host} alone; call `down` there"))
    if not entry.gone:
        try:
            _ended(entry, tell)
        except ClusterError as error:
            if entry.pid is None:
                raise _not_ended(entry, error) from None
            tell(f"the service does not answer ({error}); its head is ended")
    if entry.pid is not None:
        local_head.end(entry.pid, entry.pid_created)
    forget_lost_head(entry.name)
    registry.forget(entry)
    return entry.name


def _meant(name: str | None) -> registry.Entry:
    """Returns the entry of a service, live or not; None: the only one."""
    if name is not None:
        return registry.read(name) or registry.choose(name)
    lost = registry.lost_services()
    if len(lost) == 1 and not any(entry.kind == "service" for entry in registry.entries()):
        return lost[0]
    return registry.choose(None, "service")


def _at(address: str, name: str | None, namespace: str | None) -> registry.Entry:
    """Returns this user's entry of a service on a cluster, or a new one."""
    if name is None:
        raise ConfigError("--run: name the service that is to be ended on that cluster")
    entry = entry_at(address, name)
    if entry is not None and entry.name == name and namespace in (None, entry.namespace):
        return entry
    token_path, loopback = (entry.token_path, entry.loopback) if entry else (None, False)
    return registry.Entry(name, "service", address, namespace or "ray_probe", token_path, loopback, "", utc_now())


def _not_ended(entry: registry.Entry, error: ClusterError) -> ClusterError:
    """Returns the error with the fate of the entry, which goes with its cluster."""
    if registry.read(entry.name) != entry:
        return error
    if isinstance(error, NoClusterError):
        registry.forget(entry)
        return NoClusterError(f"{error}; {entry.name!r} is gone with its cluster, and no longer listed as up")
    return ClusterError(f"{error}; {entry.name!r} may be up, and stays listed (in {entry.file})")


def _ended(entry: registry.Entry, tell: Tell) -> None:
    """Ends a service's actors on its cluster, also without its controller.

    Raises ConfigError for a run, and for a name that neither cluster nor registry has.
    """
    from ray_probe.cluster.actors.own_actors import end_children, end_server
    from ray_probe.cluster.controllers import controllers

    with connected(
        entry.address, entry.namespace, None, token_path=entry.token_path, loopback=entry.loopback, log=lambda _: None
    ):
        there = controllers(entry.namespace)
        controller = there.get(entry.name)
        if controller is None:
            served = end_server(entry.name, entry.namespace)
            if not end_children(entry.name, entry.namespace) and not served and registry.read(entry.name) != entry:
                remedy = f"the namespace {entry.namespace!r} has {', '.join(there) or 'none'}"
                raise ConfigError(bad_value("--run", entry.name, f"no service of that name is up there; {remedy}"))
            tell("its controller is gone; its other actors were ended")
            return
        if controller.ask_kind() == "run":
            raise ConfigError(bad_value("--run", entry.name, "it is a run; end it with Ctrl-C where it was started"))
        if not ProbeClient(controller, entry.namespace, ExitStack()).end():
            tell("its measurement did not stop in time; its actors were ended")


def forget_lost_head(name: str) -> None:
    """Removes the temp dir, with the token, of a service's killed head."""
    entry = registry.read(name)
    if entry is not None and entry.gone and entry.loopback and entry.token_path is not None:
        left = Path(entry.token_path).parent
        if left.name.startswith(PREFIX) and left.is_dir() and left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)
