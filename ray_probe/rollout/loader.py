"""What a rollout actor is told to load, and the loading: once a node into the cache, then straight to the device."""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from threadpoolctl import threadpool_limits

from ray_probe.checkpoints.memory_forecast import MemoryDemand, check_fits
from ray_probe.config.loading import config_from_dict, to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import ClusterError
from ray_probe.run.forward_passes import held_room
from ray_probe.run.messages import ActorFacts
from ray_probe.run.prepared import CheckpointId, PreparedRun
from ray_probe.system.versions import check_versions, package_versions

if TYPE_CHECKING:
    from ray_probe.checkpoints.node_cache import NodeCopy
    from ray_probe.rollout.builder import RolloutBuilder
    from ray_probe.rollout.rollout import Rollout


HELD_SHARE = 0.5
"""Of the memory that is free once the model is loaded, what held graphs may take: forecasts are not exact."""


@dataclass(frozen=True)
class LoadRequest:
    """A checkpoint to load, light enough for every actor.

    Attributes:
        config: the measurement's configuration, plain JSON types.
        checkpoint: which, with its fingerprints.
        policy_id: what records are marked with.
        memory: what an actor needs on its device.
        versions: of the packages that the driver runs.
    """

    config: Mapping[str, Any]
    checkpoint: CheckpointId
    policy_id: str
    memory: MemoryDemand
    versions: Mapping[str, str]

    @classmethod
    def of(cls, prepared: PreparedRun) -> "LoadRequest":
        """The order for a run that can start."""
        return cls(
            to_dict(prepared.config), prepared.checkpoint, prepared.policy_id, prepared.memory, package_versions()
        )


class Loader:
    """Loads one checkpoint after the other, into the model that is there where the architecture is the same.

    Args:
        on_progress: told of tokens done.
    """

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        self._on_progress = on_progress
        self._assembly: RolloutBuilder | None = None
        self._copy: NodeCopy | None = None

    def load(self, order: LoadRequest, node: str) -> "tuple[Rollout, ActorFacts]":
        """Load what is ordered; returns the rollout, and what the actor says of itself.

        Args:
            order: what to load.
            node: address of this node, for messages.

        Raises:
            CheckpointError: what was loaded here is another checkpoint, or none.
            OutputError: `model.cache_dir` cannot be written.
            ClusterError: a GPU was asked for and this process sees none, the device is too small, or this node has
                other versions.
        """
        check_versions(order.versions)
        config = config_from_dict(order.config)
        pin_threads(config.cluster.cpus_per_actor)
        device, device_name, device_bytes = _device(config, node)
        check_fits(order.memory, device_bytes, device_name)
        rollout = self._brought_in(order, config, device)
        spare_bytes = int(HELD_SHARE * _free_bytes(config, device))
        rollout.most_held = held_room(config, order.memory, spare_bytes)
        import torch

        return rollout, ActorFacts(
            layout=rollout.layout,
            device=device_name if device == "cuda" else device,
            threads=torch.get_num_threads(),
            spare_bytes=spare_bytes,
            frozen=rollout.frozen,
            why_no_head=rollout.why_no_head,
            takes_padding=rollout.takes_padding,
            cache_gap=rollout.cache_gap,
            pid=os.getpid(),
            node=node,
        )

    def _brought_in(self, order: LoadRequest, config: ProbeConfig, device: str) -> "Rollout":
        from ray_probe.checkpoints.load import check_fingerprint
        from ray_probe.checkpoints.node_cache import node_copy
        from ray_probe.rollout.builder import RolloutBuilder

        wanted = order.checkpoint
        copy = node_copy(
            config.model.cache_dir, wanted.directory, wanted.fingerprint, wanted.adapter, wanted.adapter_fingerprint
        )
        before, self._copy = self._copy, copy
        if before is not None:
            before.release()
        if self._assembly is None:
            self._assembly = RolloutBuilder()
        rollout = self._assembly.load(config, copy.directory, copy.adapter, order.policy_id, device, self._on_progress)
        # After loading, as files may be overwritten while one reads.
        check_fingerprint(copy.directory, wanted.fingerprint, copy.adapter, wanted.adapter_fingerprint)
        return rollout


def check_fits_here(config: ProbeConfig, memory: MemoryDemand) -> None:
    """Refuse what does not fit in this machine's memory, where its Ray is started here. Raises ClusterError."""
    if config.cluster.address is None and config.cluster.gpus_per_actor == 0:
        _, name, there = _device(config, platform.node())
        check_fits(memory, there, name)


def _free_bytes(config: ProbeConfig, device: str) -> int:
    """Memory of this actor's device that nobody uses now; on a CPU its share of the node's, or of the container's."""
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * min(1.0, config.cluster.gpus_per_actor))
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free // _actors_here(config)


def _actors_here(config: ProbeConfig) -> int:
    """Actors that share a node without GPUs, at most."""
    cluster = config.cluster
    return min(cluster.actors, max(1, (os.cpu_count() or 1) // cluster.cpus_per_actor))


def _device(config: ProbeConfig, node: str) -> tuple[str, str, int]:
    """Kind, name and bytes of the device of this actor. Raises ClusterError when there is no GPU and one was asked."""
    import torch

    cluster = config.cluster
    if cluster.gpus_per_actor == 0:
        return "cpu", f"an actor's share of node {node}", psutil.virtual_memory().total // _actors_here(config)
    if not torch.cuda.is_available():
        raise ClusterError(
            f"cluster.gpus_per_actor: got {cluster.gpus_per_actor:g}; the actor on node {node} sees no CUDA device, "
            "use 0 or nodes with GPUs and a CUDA build of torch"
        )
    share = min(1.0, cluster.gpus_per_actor)
    return "cuda", torch.cuda.get_device_name(), int(torch.cuda.get_device_properties(0).total_memory * share)


def pin_threads(count: int) -> None:
    """Use `count` threads in torch and in numpy's BLAS, in this process, from now on."""
    torch.set_num_threads(count)
    threadpool_limits(limits=count)
