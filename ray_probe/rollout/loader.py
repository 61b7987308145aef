"""Loads checkpoints on a rollout actor. Imports torch only when it loads."""

import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from threadpoolctl import threadpool_limits

from ray_probe.checkpoints.memory_forecast import MemoryDemand, check_fits
from ray_probe.config.loading import config_from_dict, to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import ClusterError
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.forward_passes import held_room
from ray_probe.run.preparation.prepared import CheckpointId, PreparedRun
from ray_probe.system.versions import check_versions, package_versions

if TYPE_CHECKING:
    from ray_probe.checkpoints.node_cache import NodeCopy
    from ray_probe.rollout.builder import RolloutBuilder
    from ray_probe.rollout.comparison import Comparison
    from ray_probe.rollout.response_store import ResponseStore
    from ray_probe.rollout.rollout import Rollout


HELD_SHARE = 0.5
"""Share of the memory left by the model that held graphs may take; forecasts are not exact."""


@dataclass(frozen=True)
class LoadRequest:
    """A request to load a checkpoint, small enough for every actor.

    Attributes:
        config: the measurement's configuration, plain JSON types.
        checkpoint: the checkpoint with its fingerprints.
        policy_id: identifies the policy in records.
        memory: what an actor needs on its device.
        versions: the driver's versions of packages.
        against: of a comparison, the checkpoint A.
    """

    config: Mapping[str, Any]
    checkpoint: CheckpointId
    policy_id: str
    memory: MemoryDemand
    versions: Mapping[str, str]
    against: CheckpointId | None = None

    @classmethod
    def of(cls, prepared: PreparedRun) -> "LoadRequest":
        """Returns the request of a prepared run."""
        return cls(
            to_dict(prepared.config), prepared.checkpoint, prepared.policy_id, prepared.memory, package_versions(),
            prepared.against,
        )  # fmt: skip


class Loader:
    """Loads one checkpoint after another; reuses a model of the same architecture.

    Args:
        on_progress: receives numbers of tokens done.
    """

    def __init__(self, on_progress: Callable[[int], None]) -> None:
        self._on_progress = on_progress
        self._assembly: RolloutBuilder | None = None
        self._copies: list[NodeCopy] = []

    def load(self, order: LoadRequest, node: str) -> "tuple[Rollout | Comparison, ActorFacts]":
        """Load a checkpoint; returns its rollout, and facts about this actor.

        Args:
            order: the request.
            node: address of this node, for messages.

        Raises:
            CheckpointError: the files are incomplete, or of another checkpoint.
            OutputError: `model.cache_dir` cannot be written.
            ClusterError: this process sees no GPU and needs one, the device is too small, or this node has other
                versions.
        """
        check_versions(order.versions)
        config = config_from_dict(order.config)
        pin_threads(config.cluster.cpus_per_actor)
        device, device_name, device_bytes = _device(config, node)
        in_turns = check_fits(order.memory, device_bytes, device_name)
        rollout = self._brought_in(order, config, device, in_turns)
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
            moved_share=rollout.moved_share,
            in_turns=in_turns,
        )

    def _brought_in(
        self, order: LoadRequest, config: ProbeConfig, device: str, in_turns: bool
    ) -> "Rollout | Comparison":
        from ray_probe.checkpoints.fingerprint import check_fingerprint
        from ray_probe.checkpoints.node_cache import node_copy
        from ray_probe.rollout.builder import RolloutBuilder

        wanted = [one for one in (order.against, order.checkpoint) if one is not None]
        copies = [
            node_copy(config.model.cache_dir, one.directory, one.fingerprint, one.adapter, one.adapter_fingerprint)
            for one in wanted
        ]
        before, self._copies = self._copies, copies
        for copy in before:
            copy.release()
        if self._assembly is None:
            self._assembly = RolloutBuilder()
        places = [(copy.directory, copy.adapter) for copy in copies]
        rollout: Rollout | Comparison
        if order.against is None:
            store = _store(config, order.checkpoint, order.checkpoint)
            rollout = self._assembly.load(config, *places[0], order.policy_id, device, self._on_progress, store)
        else:
            ways = device, self._on_progress, in_turns, _store(config, order.against, order.checkpoint)
            rollout = self._assembly.compare(config, places, order.policy_id, *ways)
        # After loading, because a trainer may overwrite files during the load.
        for one, place in zip(wanted, places, strict=True):
            check_fingerprint(place[0], one.fingerprint, place[1], one.adapter_fingerprint)
        return rollout


def _store(config: ProbeConfig, read: CheckpointId, kept: CheckpointId) -> "ResponseStore | None":
    """Returns the store of a measurement in a series; None where no response is kept.

    Args:
        config: of the measurement.
        read: the checkpoint of the responses that are read.
        kept: the checkpoint of those that are kept.
    """
    from ray_probe.rollout.response_store import ResponseStore, policy_key

    before, output = config.compare.responses_from, config.output
    own = Path(output.dir) / str(output.name) if config.compare.keep_responses else None
    if before is None and own is None:
        return None
    keys = policy_key(config, read), policy_key(config, kept)
    return ResponseStore(None if before is None else Path(before), own, keys)


def check_fits_here(config: ProbeConfig, memory: MemoryDemand) -> None:
    """Raises ClusterError for a model that does not fit this machine's memory.

    A run that joins a cluster, or uses GPUs, is not checked here.
    """
    if config.cluster.address is None and config.cluster.gpus_per_actor == 0:
        _, name, there = _device(config, platform.node())
        check_fits(memory, there, name)


def _free_bytes(config: ProbeConfig, device: str) -> int:
    """Returns the free bytes of this actor's device; on a CPU its share of the node's."""
    import torch

    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0] * min(1.0, config.cluster.gpus_per_actor))
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, max(0, int(text) - int(used.read_text())))
    return free // _actors_here(config)


def _actors_here(config: ProbeConfig) -> int:
    """Returns how many actors can share a node without GPUs."""
    cluster = config.cluster
    return min(cluster.actors, max(1, (os.cpu_count() or 1) // cluster.cpus_per_actor))


def _device(config: ProbeConfig, node: str) -> tuple[str, str, int]:
    """Returns kind, name and bytes of this actor's device. Raises ClusterError."""
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
    """Use `count` threads in torch and in numpy's BLAS in this process."""
    import torch

    torch.set_num_threads(count)
    threadpool_limits(limits=count)
