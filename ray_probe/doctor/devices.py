"""Check that the devices of actors have enough free memory."""

import contextlib
from pathlib import Path

import psutil

from ray_probe.checkpoints.memory_forecast import check_fits, size
from ray_probe.cluster.connection.demand import Demand, room
from ray_probe.doctor.checks import Case, Finding
from ray_probe.doctor.nodes import ask, nodes_with_room, problems
from ray_probe.errors import ClusterError, some

LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")  # of a container


def memory(case: Case) -> Finding:
    """Check that every node has free memory for all actors that it can hold."""
    from ray_probe.run.preparation.prepare import memory_of

    demand, needed = Demand.of(case.run.cluster), memory_of(case.run, case.policies, case.longest)
    gpus = demand.gpus_per_actor
    answers = ask(nodes_with_room(case), free_device, gpus > 0, **({"num_gpus": gpus} if gpus else {}))
    if silent := problems(answers, lambda value: None):
        raise ClusterError(f"memory: {some(silent)}; look at that node, or wait until its devices are free")
    shares, in_turns = [], False
    for answer in answers:
        name, free = answer.value
        there = room(demand, [answer.node.resources])
        actors = demand.actors if there is None else min(demand.actors, there)
        share = free * min(1.0, gpus) if gpus else free / actors
        whose = f"{name} of node {answer.node.name}" + (f" for each of {actors} actors" if not gpus else "")
        in_turns |= check_fits(needed, int(share), whose)
        shares.append((share, whose))
    least, whose = min(shares)
    remedy = "watch the memory of the first shards" if needed.unknown else None
    if in_turns:
        remedy = "it holds one model at a time and loads each once a shard; larger shards (batch.shard_prompts) help"
    return Finding(f"an actor needs {needed.line()}, and {whose} has {size(least)}", remedy)


def free_device(cuda: bool) -> tuple[str, int]:
    """Return the name and free bytes of the device of an actor in this process.

    Raises:
        ClusterError: `cuda` is set, and torch sees no CUDA device in this process.
    """
    if not cuda:
        return "the memory", _free_memory()
    import torch

    if not torch.cuda.is_available():
        raise ClusterError(f"torch {torch.__version__} sees no CUDA device; install a CUDA build of torch there")
    return torch.cuda.get_device_name(), torch.cuda.mem_get_info()[0]


def _free_memory() -> int:
    """Return the available memory, within the container's limit."""
    free = int(psutil.virtual_memory().available)
    for limit in LIMITS:
        with contextlib.suppress(OSError, ValueError):  # the file does not exist, or holds "max"
            free = min(free, int(Path(limit).read_text()))
    return free
