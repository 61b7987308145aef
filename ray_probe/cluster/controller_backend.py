"""The backend of a controller; any thread may scale and query its actors."""

from collections.abc import Mapping
from typing import Any

import ray

from ray_probe.cluster.backend import RayBackend
from ray_probe.cluster.connection.demand import Demand, room
from ray_probe.cluster.connection.nodes import alive_nodes
from ray_probe.controller.replies import Scaled
from ray_probe.run.preparation.prepared import few_shards

OF_RAY = ("memory", "object_store_memory")


class RayControllerBackend(RayBackend):
    """Rollout actors, fitter and writer that any thread may scale and query."""

    _requested = False  # more room was requested of the autoscaler

    def close(self) -> None:
        """End the actors, and withdraw the request to the autoscaler."""
        super().close()
        if self._requested:
            request_resources(None)

    def tend(self) -> None:
        """Start missing actors and end those that are too many, between measurements."""
        self.pool.rest()

    def scale(self, actors: int) -> Scaled:
        """Ask for this many rollout actors from now on.

        Actors without room are requested of the autoscaler, where the cluster has one, and start when there is room.
        """
        demand = self._demand(actors)
        room_for = room(demand, [node.resources for node in alive_nodes()])
        before = self.pool.census()
        self.pool.scale(actors)
        messages = [] if (warning := self._few_shards(actors)) is None else [f"warning: {warning}"]
        if room_for is not None and (actors > room_for or self._requested):
            self._requested = actors > room_for
            request_resources(demand if self._requested else None)
        if room_for is not None and actors > room_for:
            each = " + ".join(f"{amount:g} {name}" for name, amount in demand.per_actor().items())
            messages.append(
                f"requested {actors} actors ({each} each), the cluster has room for {room_for}; "
                f"the other {actors - room_for} start when an autoscaler or you add nodes"
            )
        if (leaving := len(before.members) - actors) > 0:
            messages.append(f"{leaving} of {len(before.members)} actors leave after the next commit; no shard is lost")
        return Scaled(actors, before.alive, actors if room_for is None else room_for, tuple(messages))

    def census(self) -> Mapping[str, Any]:
        """Return the fields of `Status` about actors and cluster."""
        nodes, there = alive_nodes(), self.pool.census()
        return {
            "namespace": ray.get_runtime_context().namespace,
            "actors_asked": there.asked,
            "actors_alive": there.alive,
            "actors_starting": max(0, min(there.starting, there.asked - there.alive)),
            "actors_leaving": max(0, len(there.members) - there.asked),
            "actors": there.members,
            "last_failure": there.last_failure,
            "nodes": len(nodes),
            "resources": _plain(ray.cluster_resources()),
            "free": _plain(ray.available_resources()),
            "warnings": tuple(line for line in (self._few_shards(there.asked), there.waiting) if line is not None),
        }

    def _few_shards(self, actors: int) -> str | None:
        return few_shards(self._config if self._prepared is None else self._prepared.config, actors)

    def _demand(self, actors: int) -> Demand:
        cluster = self._config.cluster
        return Demand(actors, cluster.cpus_per_actor, cluster.gpus_per_actor, cluster.resources, actors)


def request_resources(demand: Demand | None) -> None:
    """Request room for these actors of the autoscaler; None withdraws the request."""
    from ray.autoscaler.sdk import request_resources as request

    request(bundles=[] if demand is None else [demand.per_actor()] * demand.actors)


def _plain(resources: Mapping[str, float]) -> dict[str, float]:
    """Drop the resources that Ray counts for itself."""
    return {name: amount for name, amount in sorted(resources.items()) if ":" not in name and name not in OF_RAY}
