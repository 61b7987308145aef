"""The probe's work on a Ray cluster: one fitter actor, a pool of rollout actors."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ray_probe.cluster.actors import FitterActor
from ray_probe.cluster.pool import Pool, fitter_lost, task_error
from ray_probe.cluster.round_work import FITTER_DEADLINE_S, RoundWork
from ray_probe.config import ProbeConfig, to_dict
from ray_probe.gradients import Layout
from ray_probe.offline_entropy_probe import RoundOutcome
from ray_probe.plan import Shard
from ray_probe.rules import baseline_rule
from ray_probe.tracker import Tracker
from ray_probe.versions import package_versions


def actor_options(config: ProbeConfig) -> dict[str, Any]:
    """`ray.remote` options of a rollout actor: its resources, and one thread a CPU that it was given.

    The configured `runtime_env` belongs to the connection (Ray takes local directories only there).
    """
    cluster = config.cluster
    threads = {"OMP_NUM_THREADS": str(cluster.cpus_per_actor), "TOKENIZERS_PARALLELISM": "false"}
    asked: dict[str, Any] = dict(cluster.runtime_env)
    variables = {name: value for name, value in threads.items() if name not in asked.get("env_vars", {})}
    return {
        "num_cpus": cluster.cpus_per_actor,
        "num_gpus": cluster.gpus_per_actor,
        "resources": dict(cluster.resources),
        "runtime_env": {"env_vars": variables},
    }


class RayBackend:
    """Fitter and rollout actors on the cluster that this process is connected to.

    Args:
        config: the run's configuration.
        directory: the checkpoint's directory, on every node.
        policy_id: what records and fits are marked with.
        fingerprint: of the checkpoint, which every actor compares with what it loaded.
        log: told of deaths and replacements, one line each.
        pool_options: passed on to `Pool`; for tests.
    """

    def __init__(
        self,
        config: ProbeConfig,
        directory: Path,
        policy_id: str,
        fingerprint: str,
        log: Callable[[str], None] = lambda text: None,
        **pool_options: Any,
    ) -> None:
        self._config = config
        self._policy_id = policy_id
        self._fitter: Any = None
        arguments = (to_dict(config), str(directory), policy_id, fingerprint, package_versions())
        self._pool = Pool(self.actors, actor_options(config), arguments, log, **pool_options)

    @property
    def actors(self) -> int:
        """Rollout actors asked for."""
        return self._config.cluster.actors

    @property
    def info(self) -> dict[str, Any]:
        """What a started actor said of itself: layout, EOS ids, device, threads."""
        return self._pool.info

    @property
    def layout(self) -> Layout:
        """Names and shapes of the trainable parameters."""
        layout: Layout = self.info["layout"]
        return layout

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the started rollout actors, by actor."""
        return self._pool.pids

    def start(self, wait_for: int = 1) -> None:
        """Start the rollout actors; returns when so many are ready.

        Raises:
            ProbeError: the checkpoint or the device is refused by an actor, or no actor starts.
        """
        self._pool.start(wait_for)

    def open(self, ledger: Path, finished: Sequence[Sequence[int]] = ()) -> None:
        """Start the fitter, on this node, beside its ledger.

        Args:
            ledger: file of accepted records.
            finished: shards of each round that a resumed run keeps.
        """
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        create = ray.remote(FitterActor).options(
            num_cpus=0, max_restarts=0, scheduling_strategy=here, runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}}
        )
        self._fitter = create.remote(baseline_rule(self._config), self._policy_id, str(ledger), finished)
        self._ask_fitter("open")

    def beta(self) -> dict[str, Any]:
        """The fitter's current global fit."""
        report: dict[str, Any] = self._ask_fitter("beta")
        return report

    def run_round(self, shards: Sequence[Shard], tracker: Tracker) -> RoundOutcome:
        """Work one round off; returns when its gradient is here, each shard in it once."""
        lagged = self._config.estimator.baseline.fit == "lagged"
        work = RoundWork(shards, self._pool, self._fitter, self._ask_fitter, tracker, lagged)
        return work.run(self.layout.size)

    def close(self) -> None:
        """Kill the actors."""
        self._pool.close()
        if self._fitter is not None:
            ray.kill(self._fitter)
            self._fitter = None

    def _ask_fitter(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._fitter, method).remote(*args), timeout=FITTER_DEADLINE_S)
        except RayTaskError as error:
            raise task_error(error) from None
        except RayError as error:
            raise fitter_lost(error) from error
