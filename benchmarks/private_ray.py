"""A Ray of the benchmarks' own: started as a run starts it, ended with the block."""

import contextlib
from collections.abc import Iterator

from ray_probe.cluster.connection.connect import connected
from ray_probe.cluster.connection.demand import Demand
from ray_probe.rollout.loader import pin_threads


@contextlib.contextmanager
def private_ray(slots: int) -> Iterator[None]:
    """Ray with so many actor slots of one CPU; this process keeps to one thread beside it."""
    pin_threads(1)
    demand = Demand(slots, 1, 0, {}, slots)
    with connected(None, "benchmarks", demand, log=lambda text: None):
        yield
