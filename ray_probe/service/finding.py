"""From the name of what is live to the actor that answers for it, on the cluster that this process joins."""

import contextlib
from typing import Any

from ray_probe.errors import ClusterError, ConfigError, bad_value
from ray_probe.service import names


def join(stack: contextlib.ExitStack, address: str, namespace: str, token_path: str | None, loopback: bool) -> None:
    """Connect this process to the cluster, unless it is."""
    import ray

    if ray.is_initialized():
        here = ray.get_runtime_context().gcs_address
        if address not in ("auto", here):
            remedy = f"this process is connected to the Ray cluster at {here} already; call ray.shutdown() first"
            raise ClusterError(bad_value("address", address, remedy))
        return
    from ray_probe.cluster.connection import connected

    stack.enter_context(
        connected(address, namespace, None, token_path=token_path, loopback=loopback, log=lambda text: None)
    )


def find(name: str | None, namespace: str) -> tuple[Any, str]:
    """The controller of that name (None: of the only one there is), and its name."""
    import ray

    actors = ray.util.list_named_actors(all_namespaces=True)
    owners = (names.owner(actor["name"]) for actor in actors if actor["namespace"] == namespace)
    there = sorted(owner for owner in owners if owner is not None)
    if name is None and len(there) == 1:
        name = there[0]
    if name not in there:
        remedy = f"the namespace {namespace!r} has {', '.join(there) or 'none'}"
        raise ConfigError(bad_value("--run", name, f"choose a service or run that is up; {remedy}"))
    with contextlib.suppress(ValueError):
        return ray.get_actor(names.controller(name), namespace=namespace), name
    raise ClusterError(f"{name}: its controller has just ended")
