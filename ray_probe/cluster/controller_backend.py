"""The backend of a controller: one thread works with it, any thread counts, asks and scales its actors."""

from collections.abc import Mapping
from typing import Any

import ray

from ray_probe.cluster.backend import RayBackend
from ray_probe.cluster.connection.demand import Demand, room
from ray_probe.cluster.connection.nodes import alive_nodes
from ray_probe.controller.replies import Actor, Scaled
from ray_probe.errors import ConfigError
from ray_probe.run.messages import InSample
from ray_probe.run.prepared import few_shards
from ray_probe.run.result import Beta

QUERY_S = 10.0
OF_RAY = ("memory", "object_store_memory")


class RayControllerBackend(RayBackend):
    """Rollout actors, fitter and writer that can be looked after, counted, asked and scaled."""

    _requested = False

    def close(self) -> None:
        """End the actors, and take back what was asked of the autoscaler."""
        super().close()
        if self._requested:
            request_resources(None)

    def tend(self) -> None:
        """Start actors that are missing and end those too many: between measurements nothing depends on one."""
        self._pool.rest()

    def scale(self, actors: int) -> Scaled:
        """Ask for so many rollout actors from now on; any thread may.

        More than the nodes hold are asked of the autoscaler, where there is one, and start when there is room.
        """
        demand = self._demand(actors)
        there = room(demand, [node.resources for node in alive_nodes()])
        alive, have = len(self._pool.alive), len(self._pool.members)
        self._pool.asked = actors
        self._pool.try_again()
        messages = [] if (warning := self._few_shards(actors)) is None else [f"warning: {warning}"]
        if there is not None and (actors > there or self._requested):
            self._requested = actors > there
            request_resources(demand if self._requested else None)
        if there is not None and actors > there:
            each = " + ".join(f"{amount:g} {name}" for name, amount in demand.per_actor().items())
            messages.append(
                f"asked {actors} x ({each}), the cluster has room for {there}: so many work, the others start when an "
                "autoscaler or you add nodes"
            )
        if actors < have:
            messages.append(f"{have - actors} of {have} leave once what they have done is committed; no shard is lost")
        return Scaled(actors, alive, actors if there is None else there, tuple(messages))

    def census(self) -> Mapping[str, Any]:
        """Actors and cluster, as `Status` shows them; any thread may ask."""
        nodes, pool = alive_nodes(), self._pool
        asked, alive, members = pool.asked, len(pool.alive), pool.members
        return {
            "namespace": ray.get_runtime_context().namespace,
            "actors_asked": asked,
            "actors_alive": alive,
            "actors_starting": max(0, min(pool.starting, asked - alive)),
            "actors_leaving": max(0, len(members) - asked),
            "actors": tuple(Actor(m.number, m.state, m.node, m.pid, m.tokens) for m in members),
            "last_failure": pool.last_failure,
            "nodes": len(nodes),
            "resources": _plain(ray.cluster_resources()),
            "free": _plain(ray.available_resources()),
            "warnings": tuple(line for line in (self._few_shards(asked), pool.waiting) if line is not None),
        }

    def beta_of(self, version: int | None) -> Beta:
        """A version of the open measurement's fit, from the fitter itself; any thread may ask."""
        report: Beta = self._asked("beta", version)
        return report

    def in_sample(self) -> InSample:
        """The newest fit on its own records, from the fitter itself; any thread may ask."""
        report: InSample = self._asked("variance")
        return report

    def _asked(self, method: str, *args: Any) -> Any:
        fitter = self._fitter
        if fitter is None:
            raise ConfigError("ID: no measurement has been opened yet; queue one: probe CHECKPOINT")
        return fitter.ask(method, *args, deadline_s=QUERY_S)

    def _few_shards(self, actors: int) -> str | None:
        return few_shards(self._config if self._prepared is None else self._prepared.config, actors)

    def _demand(self, actors: int) -> Demand:
        cluster = self._config.cluster
        return Demand(actors, cluster.cpus_per_actor, cluster.gpus_per_actor, cluster.resources, actors)


def request_resources(demand: Demand | None) -> None:
    """Ask the autoscaler for room for these actors, or (None) for nothing any more; without one nobody reads it."""
    from ray.autoscaler.sdk import request_resources as request

    request(bundles=[] if demand is None else [demand.per_actor()] * demand.actors)


def _plain(resources: Mapping[str, float]) -> dict[str, float]:
    """Resources that actors ask for, without what Ray keeps count of for itself."""
    return {name: amount for name, amount in sorted(resources.items()) if ":" not in name and name not in OF_RAY}
