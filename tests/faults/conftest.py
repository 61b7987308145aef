"""One cluster for the whole package, on which Ray tells of deaths fast and every process looks for failpoints.

A package's fixture, not a session's: other tests of this process start clusters of their own.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from support.answers import Answer
from support.failpoints import disarm_all, failpoints_in
from support.light import BUCKET, LightActor, here, light_config, light_prepared
from support.ray_runs import own, run_here

from ray_probe.cluster.backend import RayBackend
from ray_probe.cluster.head.environment import env_to_start, environment, private_dir
from ray_probe.run.preparation.prepared import baseline_rule

FAST = {"timeout_ms_task_wait_for_death_info": 100, "core_worker_internal_heartbeat_ms": 100}
"""How long Ray keeps a call of a dead actor to itself: by default 1 to 2 s, in which the next life is long there."""
TESTS = Path(__file__).parents[1]


@pytest.fixture(scope="package")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with failpoints_in(tmp_path_factory.mktemp("failpoints")) as directory:
        yield directory


@pytest.fixture(scope="package", autouse=True)
def cluster(armed: Path) -> Iterator[str]:
    """Address of the cluster; its workers import what tests share."""
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    with private_dir() as directory, environment(env_to_start(directory) | {"PYTHONPATH": paths}):
        ray.init(
            address="local", num_cpus=8, include_dashboard=False, log_to_driver=False, object_store_memory=100_000_000,
            _temp_dir=os.path.join(directory, "r"), _system_config=FAST,
        )  # fmt: skip
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def backend(files: Path) -> Iterator[RayBackend]:
    """Light actors that one run after the other uses, as those of a service."""
    with own(light_prepared(light_config(files)), LightActor, bucket_numbers=BUCKET) as there:
        yield there


@pytest.fixture(scope="module")
def reference(files: Path) -> Answer:
    """The run of three rounds of six shards, in this process."""
    prepared = light_prepared(light_config(files))
    return run_here(prepared, "reference", here(baseline_rule(prepared.config)))


@pytest.fixture
def points(armed: Path) -> Iterator[Path]:
    """Where a test arms failpoints; none is left to the next."""
    yield armed
    disarm_all(armed)
