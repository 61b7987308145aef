"""Finds the actors of ray_probe on a cluster by a marker method, as other programs may use the same names."""

import contextlib
from typing import Any

import ray

from ray_probe.cluster.actors import actor_names
from ray_probe.cluster.actors.calls import ask, kill
from ray_probe.errors import ClusterError, ConfigError, bad_value

KIND_S = 5.0


class OwnActor:
    """Marks an actor class of ray_probe; a handle tells its methods without a call."""

    def of_ray_probe(self) -> None:
        """Nothing to do: a handle that has this method is one of ray_probe's actors."""


def controllers(namespace: str) -> dict[str, Any]:
    """Handles of the controllers of a namespace, by the name of their service or run."""
    there = {name: actor for actor in _names(namespace) if (name := actor_names.owner(actor)) is not None}
    handles = {name: _handle(actor, namespace) for name, actor in there.items()}
    return {name: handle for name, handle in sorted(handles.items()) if _is_ours(handle)}


def kind_of(controller: Any, name: str) -> str | None:
    """What a controller drives, service or run; None when it does not answer."""
    try:
        kind: str = ask(controller, name, "kind", deadline_s=KIND_S)
        return kind
    except ClusterError:
        return None


def end_children(name: str, namespace: str) -> bool:
    """Kill what is left of a service's or run's actors but its controller; returns whether there was any."""
    handles = [_handle(actor, namespace) for actor in actor_names.children(name, _names(namespace))]
    ours = [handle for handle in handles if _is_ours(handle)]
    for handle in ours:
        kill(handle)
    return bool(ours)


def refuse_taken_name(field: str, name: str, namespace: str) -> None:
    """Refuse the name of a service or run where actors have the names that its own would get.

    Args:
        field: what the user gave the name with.
        name: of the service or run.
        namespace: in which its actors are named.

    Raises:
        ConfigError: a service or run of that name is up, or an actor of another program has such a name.
    """
    if name in controllers(namespace):
        remedy = f"a service or run of that name is up in the namespace {namespace!r}; choose another"
        raise ConfigError(bad_value(field, name, f"{remedy}, or end it: `down` a service, Ctrl-C a run"))
    for actor in (actor_names.controller(name), *actor_names.children(name, _names(namespace))):
        handle = _handle(actor, namespace)
        if handle is not None and not _is_ours(handle):
            remedy = f"the namespace {namespace!r} has an actor {actor!r} of another program; choose another name"
            raise ConfigError(bad_value(field, name, remedy))


def _names(namespace: str) -> list[str]:
    """Names of the live actors of a namespace."""
    return [actor["name"] for actor in ray.util.list_named_actors(True) if actor["namespace"] == namespace]


def _handle(actor: str, namespace: str) -> Any:
    """The handle of a named actor; None when it has ended."""
    with contextlib.suppress(ValueError):
        return ray.get_actor(actor, namespace=namespace)
    return None


def _is_ours(handle: Any) -> bool:
    return hasattr(handle, OwnActor.of_ray_probe.__name__)
