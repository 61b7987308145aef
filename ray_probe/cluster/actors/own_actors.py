"""Finds ray_probe's actors by a marker, as other programs may use the same names."""

import contextlib
import os
from typing import Any

import ray

from ray_probe.cluster.actors import actor_names
from ray_probe.cluster.actors.calls import kill


class OwnActor:
    """Marks an actor class of ray_probe; a handle knows its methods without a call."""

    def of_ray_probe(self) -> None:
        """Do nothing; a handle with this method is of an actor of ray_probe."""

    def pid(self) -> int:
        """Return the id of this process."""
        return os.getpid()


def end_children(name: str, namespace: str) -> bool:
    """Kill a service's or run's actors but its controller; returns whether any lived."""
    handles = [named_actor(actor, namespace) for actor in actor_names.children(name, names_in(namespace))]
    ours = [handle for handle in handles if is_ours(handle)]
    for handle in ours:
        kill(handle)
    return bool(ours)


def end_server(name: str, namespace: str) -> bool:
    """Kill a service's or run's web server; returns whether it had one."""
    handle = named_actor(actor_names.http(name), namespace)
    if found := is_ours(handle):
        kill(handle)
    return found


def names_in(namespace: str) -> list[str]:
    """Return the names of the live actors of a namespace."""
    return [actor["name"] for actor in ray.util.list_named_actors(True) if actor["namespace"] == namespace]


def named_actor(actor: str, namespace: str) -> Any:
    """Return Ray's handle of a named actor; None when it has ended."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(actor, namespace=namespace)
    return None


def is_ours(handle: Any) -> bool:
    """Return whether a handle is of an actor of ray_probe."""
    return hasattr(handle, OwnActor.of_ray_probe.__name__)
