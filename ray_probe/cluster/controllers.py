"""Creates controllers, and finds them by name."""

from typing import Any

import ray

from ray_probe.cluster.actors import actor_names
from ray_probe.cluster.actors.own_actors import is_ours, named_actor, names_in
from ray_probe.cluster.connection.nodes import pinned_to
from ray_probe.cluster.controller_actor import ControllerActor, ControllerSpec
from ray_probe.cluster.controller_handle import ControllerHandle
from ray_probe.errors import ConfigError, bad_value

CALLS_AT_ONCE = 32


def create(spec: ControllerSpec, node_id: str) -> ControllerHandle:
    """Start a controller on a node; a service's outlives this process.

    Raises ConfigError when another service or run, or an actor of another program, has one of its names.
    """
    field = "--name" if spec.kind == "service" else "output.name"
    refuse_taken_name(field, spec.name, ray.get_runtime_context().namespace)
    lasting: dict[str, Any] = {"lifetime": "detached", "max_restarts": -1} if spec.kind == "service" else {}
    options = ray.remote(ControllerActor).options(
        name=actor_names.controller(spec.name), num_cpus=0, max_concurrency=CALLS_AT_ONCE,
        scheduling_strategy=pinned_to(node_id),
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}}, **lasting,
    )  # fmt: skip
    return ControllerHandle(spec.name, options.remote(spec))


def controllers(namespace: str) -> dict[str, ControllerHandle]:
    """Return the controllers of a namespace by the name of their service or run."""
    owners = {name: actor for actor in names_in(namespace) if (name := actor_names.owner(actor)) is not None}
    handles = {name: named_actor(actor, namespace) for name, actor in sorted(owners.items())}
    return {name: ControllerHandle(name, handle) for name, handle in handles.items() if is_ours(handle)}


def refuse_taken_name(field: str, name: str, namespace: str) -> None:
    """Refuse the name of a service or run whose actors' names are taken.

    Args:
        field: the setting that holds the name.
        name: of the service or run.
        namespace: Ray namespace of its actors.

    Raises:
        ConfigError: a service or run of that name is up, or an actor of another program has such a name.
    """
    if name in controllers(namespace):
        remedy = f"a service or run of that name is up in the namespace {namespace!r}; choose another"
        raise ConfigError(bad_value(field, name, f"{remedy}, or end it: `down` a service, Ctrl-C a run"))
    for actor in (
        actor_names.controller(name), actor_names.http(name), *actor_names.children(name, names_in(namespace)),
    ):  # fmt: skip
        handle = named_actor(actor, namespace)
        if handle is not None and not is_ours(handle):
            remedy = f"the namespace {namespace!r} has an actor {actor!r} of another program; choose another name"
            raise ConfigError(bad_value(field, name, remedy))
