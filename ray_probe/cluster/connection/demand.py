"""What a run asks of its cluster, and whether the cluster has it."""

import math
import os
import resource
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_probe.cluster.head.ray_private import gpus_here
from ray_probe.errors import ClusterError, ConfigError, bad_value
from ray_probe.gradient.layout import BUCKET_NUMBERS

if TYPE_CHECKING:
    from ray_probe.config.schema import ClusterConfig

MIN_STORE_BYTES = 2**28
STORE_BYTES_A_SLOT = 2 * 4 * BUCKET_NUMBERS  # a bucket of the gradient that comes in and one that goes out
CROWD = 2
OPEN_FILES, OPEN_FILES_A_SLOT = 128, 8  # measured: Ray's raylet has 58 open, and 3 more for each actor


@dataclass(frozen=True)
class Demand:
    """What a run asks of the cluster.

    Attributes:
        actors: rollout actors.
        cpus_per_actor: CPUs of each.
        gpus_per_actor: GPUs of each.
        resources: further resources of each, by Ray's names.
        slots: actors that a head makes room for.
        cap: most actors that a head accepts; None: any number.
        may_crowd: the actors may ask for more than `CROWD` times the cores of this machine.
    """

    actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    resources: Mapping[str, float]
    slots: int
    cap: int | None = None
    may_crowd: bool = True

    @classmethod
    def of(cls, cluster: "ClusterConfig") -> "Demand":
        """Returns the demand of a run with this configuration."""
        return cls(
            cluster.actors, cluster.cpus_per_actor, cluster.gpus_per_actor, cluster.resources, cluster.slots,
            cluster.max_actors, "max_actors" in cluster.model_fields_set,
        )  # fmt: skip

    def per_actor(self) -> dict[str, float]:
        """Returns the amounts of one actor by Ray's names, without zeros."""
        asked = {"CPU": self.cpus_per_actor, "GPU": self.gpus_per_actor, **self.resources}
        return {name: amount for name, amount in asked.items() if amount > 0}

    @property
    def slot_cpus(self) -> int:
        """CPUs that a head declares."""
        return max(1, math.ceil(self.slots * self.cpus_per_actor))

    def head_options(self) -> dict[str, object]:
        """Returns the options of `ray.init` for a head."""
        # Objects beyond the store spill to the temp dir, and Ray does not use a /dev/shm smaller than the store.
        free = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
        store_bytes = max(MIN_STORE_BYTES, min(self.slots * STORE_BYTES_A_SLOT, int(0.5 * free)))
        return {"num_cpus": self.slot_cpus, "object_store_memory": store_bytes}


def check_machine(demand: Demand) -> None:
    """Refuses a demand that a head on this machine must not or cannot meet.

    Raises:
        ConfigError: more actors than the configuration allows.
        ClusterError: too few GPUs, other resources or open files.
    """
    if problem := over_cap(demand) or crowding(demand, cores()):
        raise ConfigError(problem)
    gpus = gpus_here() if demand.gpus_per_actor else 0.0
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if problem := shortfall(demand, [{"CPU": demand.slot_cpus, "GPU": gpus}]) or few_open_files(demand.slots, limit):
        raise ClusterError(problem)


def cores() -> int:
    """Returns the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def over_cap(demand: Demand) -> str | None:
    """Returns why a head refuses actors beyond `max_actors`, or None."""
    if demand.cap is None or demand.actors <= demand.cap:
        return None
    remedy = f"cluster.max_actors allows {demand.cap} on a Ray started here; ask for at most as many, or set"
    return bad_value("cluster.actors", demand.actors, f"{remedy} cluster.max_actors={demand.actors}")


def crowding(demand: Demand, cores: int) -> str | None:
    """Returns why a machine with these cores refuses the actors, or None."""
    if demand.may_crowd or demand.actors * demand.cpus_per_actor <= CROWD * cores:
        return None
    remedy = f"actors for more than {CROWD * cores} CPUs slow each other down on this machine's {cores} cores; ask for"
    remedy += f" fewer, lower cluster.cpus_per_actor, or set cluster.max_actors={demand.actors} to have them"
    return bad_value("cluster.actors", demand.actors, remedy)


def few_open_files(slots: int, limit: int) -> str | None:
    """Returns why this hard limit of open files is too low, or None."""
    # Ray raises the soft limit itself.
    needed = OPEN_FILES + OPEN_FILES_A_SLOT * slots
    if limit == resource.RLIM_INFINITY or limit >= needed:
        return None
    remedy = f"Ray needs at least {needed} open files for cluster.max_actors={slots}; raise the hard limit to 4096, say"
    return bad_value("ulimit -Hn", limit, remedy)


def slots_warning(demand: Demand, cores: int) -> str | None:
    """Returns a warning when the slots declare more CPUs than the machine has."""
    if demand.slots * demand.cpus_per_actor <= cores:
        return None
    return f"cluster: {demand.slots} slots x {demand.cpus_per_actor:g} CPU will share this machine's {cores} cores"


def shortfall(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> str | None:
    """Returns why nodes with these resources cannot hold all actors, or None."""
    one = demand.per_actor()
    for name, amount in one.items():
        total = sum(node.get(name, 0.0) for node in nodes)
        if demand.actors * amount > total + 1e-9:
            field = {"CPU": "cpus_per_actor", "GPU": "gpus_per_actor"}.get(name, "resources")
            have = f"asked {demand.actors} x {amount:g} {name}, the cluster has {total:g}"
            return f"cluster.{field}: {have}; ask for fewer actors or less for each, or add nodes"
    there = room(demand, nodes)
    if there is None or there >= demand.actors:
        return None
    each = " + ".join(f"{amount:g} {name}" for name, amount in one.items())
    return f"cluster.actors: asked {demand.actors} x ({each}), and the {len(nodes)} node(s) have room for {there}"


def room(demand: Demand, nodes: Sequence[Mapping[str, float]]) -> int | None:
    """Returns the number of actors that the nodes can hold; None: any number."""
    one = demand.per_actor()  # may be empty
    return sum(min(int(node.get(n, 0.0) / a + 1e-9) for n, a in one.items()) for node in nodes) if one else None
