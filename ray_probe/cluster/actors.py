"""The Ray actors, as thin wrappers around plain classes; `ray.remote` is applied where they are created."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from ray_probe.config import config_from_dict
from ray_probe.core.baselines import BaselineRule, PublishedFit
from ray_probe.errors import ClusterError
from ray_probe.fitter import Delivery, Fitter, Receipt


class FitterActor:
    """Owns the records and the fits; numpy only, so that it starts in a moment."""

    def __init__(self, rule: BaselineRule, policy_id: str, ledger_path: str, finished: Sequence[Sequence[int]]) -> None:
        self._arguments = (rule, policy_id, Path(ledger_path), finished)

    def open(self) -> None:
        """Rebuild from the ledger. Not in the constructor, whose errors would lose their type."""
        self._fitter = Fitter(*self._arguments)

    def accept(self, delivery: Delivery) -> Receipt:
        """Take in a shard's record."""
        return self._fitter.accept(delivery)

    def close_round(self, round_number: int, shards: Sequence[int]) -> PublishedFit:
        """Fit; returns the fit that the round's gradients use."""
        return self._fitter.close_round(round_number, shards)

    def current(self) -> PublishedFit:
        """The newest fit."""
        return self._fitter.current

    def beta(self) -> dict[str, Any]:
        """The current global fit, as results show it."""
        return self._fitter.beta()


class RolloutActor:
    """Generates, scores and differentiates; `tokens_done` is answered while it works (two threads)."""

    def __init__(self) -> None:
        self._tokens = 0

    def start(
        self, config: dict[str, Any], directory: str, policy_id: str, fingerprint: str, versions: dict[str, str]
    ) -> dict[str, Any]:
        """Load the checkpoint. Not in the constructor, whose errors would lose their type.

        Args:
            config: the run's configuration.
            directory: the checkpoint's directory on this node.
            policy_id: what records are marked with.
            fingerprint: of the checkpoint that the run measures.
            versions: of the packages that the driver runs.

        Raises:
            CheckpointError: what was loaded here is another checkpoint, or none.
            ClusterError: a GPU was asked for and this process sees none, or this node has other versions.
        """
        import torch

        from ray_probe.assembly import build_rollout
        from ray_probe.checkpoints import check_fingerprint
        from ray_probe.threads import pin_threads
        from ray_probe.versions import check_versions, cpu_model

        check_versions(versions)

        settings = config_from_dict(config)
        pin_threads(settings.cluster.cpus_per_actor)
        wants_gpu = settings.cluster.gpus_per_actor > 0
        if wants_gpu and not torch.cuda.is_available():
            raise ClusterError(
                f"cluster.gpus_per_actor: got {settings.cluster.gpus_per_actor:g}; the actor on node "
                f"{ray.util.get_node_ip_address()} sees no CUDA device, "
                "use 0 or nodes with GPUs and a CUDA build of torch"
            )
        device = "cuda" if wants_gpu else "cpu"
        self._rollout = build_rollout(settings, Path(directory), policy_id, device, self._on_progress)
        check_fingerprint(Path(directory), fingerprint)  # after loading: weights may be overwritten while one reads
        return {
            "layout": self._rollout.layout,
            "eos_ids": self._rollout.eos_ids,
            "device": torch.cuda.get_device_name() if wants_gpu else device,
            "cpu": None if wants_gpu else cpu_model(),
            "threads": torch.get_num_threads(),
            "pid": os.getpid(),
        }

    def collect(self, shard: Any, fitter: Any, deadline_s: float) -> tuple[Any, str]:
        """Collect a shard and deliver its record to the fitter; returns the report and the fitter's answer."""
        report = self._rollout.collect(shard)
        try:
            receipt: Receipt = ray.get(fitter.accept.remote(report.delivery), timeout=deadline_s)
        except ray.exceptions.GetTimeoutError:
            raise ClusterError(f"fitter: did not answer in {deadline_s:.0f} s; go on with run --resume") from None
        self._rollout.acknowledge(shard, receipt)
        return report, receipt.status

    def accumulate(self, shard: Any, fit: PublishedFit) -> Any:
        """Add a shard's gradient."""
        return self._rollout.accumulate(shard, fit)

    def round_gradient(self, round_number: int) -> Any:
        """The summed gradient of the shards accumulated here in this round."""
        return self._rollout.round_gradient(round_number)

    def tokens_done(self) -> int:
        """Tokens sampled and scored since the start: a count that stands still means a stuck actor."""
        return self._tokens

    def _on_progress(self, tokens: int) -> None:
        self._tokens += tokens
