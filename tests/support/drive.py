"""A driver in a process of its own: begins a light run on a cluster that is there, or goes on with it.

python -m support.drive ADDRESS RUN_DIRECTORY SHARD_S ROUNDS
"""

import sys
from pathlib import Path

import ray

from ray_probe.cluster.backend import RayBackend
from ray_probe.config import ProbeConfig
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.directory import RunDirectory
from support.light import BUCKET, light_config, light_prepared, slow

SHARDS = 10


def driven_config(parent: Path, rounds: int) -> ProbeConfig:
    """Rounds of ten shards."""
    return light_config(parent, batch={"prompts_per_round": SHARDS, "rounds": rounds}, cluster={"actors": 2})


def drive(address: str, path: Path, shard_s: float, rounds: int) -> None:
    prepared = light_prepared(driven_config(path.parent, rounds))
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    backend = RayBackend(prepared.config, print, bucket_numbers=BUCKET, actor_class=slow(shard_s))
    directory = RunDirectory(path) if path.exists() else RunDirectory.create(path.parent, path.name)
    with directory.held():
        backend.load(prepared)
        backend.open(directory, [line.records for line in directory.finished_rounds()])
        OfflineEntropyProbe(prepared.config, prepared.plan, backend, directory).run()
    backend.close()
    ray.shutdown()


if __name__ == "__main__":
    drive(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
