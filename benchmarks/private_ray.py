"""Starts Ray for a benchmark, as a run starts it."""

import contextlib
from collections.abc import Iterator

from ray_probe.cluster.connection.connect import connected
from ray_probe.cluster.connection.demand import Demand
from ray_probe.rollout.loader import pin_threads


@contextlib.contextmanager
def private_ray(slots: int) -> Iterator[None]:
    """Run Ray with `slots` actor slots of one CPU; limit this process to one thread."""
    pin_threads(1)
    demand = Demand(slots, 1, 0, {}, slots)
    with connected(None, "benchmarks", demand, log=lambda text: None):
        yield
