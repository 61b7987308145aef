"""A diagnosis names each node that differs, with the problem there."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.checkpoints import raw_config

from ray_probe.checkpoints.inspection import Checkpoint, inspect_checkpoint
from ray_probe.checkpoints.memory_forecast import size
from ray_probe.cluster.connection.nodes import Answer, Node
from ray_probe.config.loading import config_from_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.doctor import cluster, devices, node_files
from ray_probe.doctor import nodes as doctor_nodes
from ray_probe.doctor.checks import Case, Check, Finding, Step, examine
from ray_probe.errors import ClusterError
from ray_probe.run.preparation.prepare import memory_of
from ray_probe.system.versions import package_versions

NODES = [Node("aa", "first (10.0.0.1)", {"CPU": 2.0}), Node("bb", "second (10.0.0.2)", {"CPU": 2.0})]
WITH_GPUS = [Node(node.id, node.name, {"CPU": 2.0, "GPU": 1.0}) for node in NODES]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("doctor")
    raw_config(directory)
    return directory


@pytest.fixture
def configured(files: Path) -> Callable[..., ProbeConfig]:
    return lambda **sections: config_from_dict(raw_config(files, **sections))


def on_nodes(
    step: Callable[[Case], Finding], config: ProbeConfig, *answers: Any, nodes: Sequence[Node] = NODES, **found: Any
) -> Check:
    """Run a step on nodes with these answers; an exception is an error there."""
    case = Case(config, config.cluster, None, False, 1.0, None, nodes=list(nodes), **found)  # type: ignore[arg-type]
    asked = []

    def ask(nodes: list[Node], function: Any, *args: Any, **options: Any) -> list[Answer]:
        asked.append(options["resources"])
        return [
            Answer(node, error=str(value)) if isinstance(value, Exception) else Answer(node, value)
            for node, value in zip(nodes, answers, strict=True)
        ]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ray_probe.cluster.connection.nodes.ask_nodes", ask)
        check = examine(Step("it", step), case, set())
    assert len(asked) == 1
    return check


@pytest.fixture(scope="module")
def checkpoint(files: Path) -> Checkpoint:
    return inspect_checkpoint(config_from_dict(raw_config(files)).model, hashed=False)


def test_a_node_with_other_packages_or_without_ours_is_named_with_both_versions(configured):
    ours = package_versions()
    assert on_nodes(cluster.node_packages, configured(), ours, ours).ok
    other = on_nodes(cluster.node_packages, configured(), ours, ours | {"torch": "2.9.0"})
    assert other.status == "failed" and other.exit_code == 4
    assert f"node second (10.0.0.2) has torch 2.9.0 instead of {ours['torch']}" in other.detail
    without = on_nodes(cluster.node_packages, configured(), ImportError("No module named 'ray_probe'"), ours)
    assert "node first (10.0.0.1) could not say (No module named 'ray_probe')" in without.detail


def test_a_node_without_the_checkpoint_or_with_half_of_it_is_named(configured, checkpoint: Checkpoint):
    here = node_files.files_in(str(checkpoint.directory), ("*.safetensors", "*.json"))
    assert here is not None and here["model.safetensors"] > 1000
    assert on_nodes(node_files.node_checkpoint, configured(), here, here, found=checkpoint).ok
    half = here | {"model.safetensors": 10}
    check = on_nodes(node_files.node_checkpoint, configured(), None, half, found=checkpoint)
    assert check.status == "failed" and check.exit_code == 2 and check.detail.startswith("model.path: got ")
    assert "node first (10.0.0.1) does not have it" in check.detail
    assert "node second (10.0.0.2) has" in check.detail and "model.safetensors is not as it is here" in check.detail


def test_a_node_without_the_other_checkpoint_of_a_comparison_is_named(configured, checkpoint: Checkpoint):
    config = configured(compare={"against": str(checkpoint.directory)}, batch={"responses_per_prompt": 4})
    here = node_files.files_in(str(checkpoint.directory), ("*.safetensors", "*.json"))
    answers = iter([[here, here], [here, None]])
    case = Case(config, config.cluster, None, False, 1.0, None, nodes=list(NODES))  # type: ignore[arg-type]
    case.found = case.against = checkpoint
    with pytest.MonkeyPatch.context() as patch:
        asked = "ray_probe.doctor.node_files.ask"
        patch.setattr(asked, lambda nodes, *given: list(map(Answer, nodes, next(answers))))
        check = examine(Step("it", node_files.node_checkpoint), case, set())
    assert (check.status, check.exit_code) == ("failed", 2) and next(answers, None) is None
    assert check.detail.startswith("compare.against: got ")
    assert "node second (10.0.0.2) does not have it" in check.detail


def test_a_comparison_needs_the_memory_and_the_cache_of_both_checkpoints(
    configured, checkpoint: Checkpoint, tmp_path: Path
):
    config = configured(
        compare={"against": str(checkpoint.directory)}, batch={"responses_per_prompt": 4},
        model={"cache_dir": "/scratch/models"}, cluster={"actors": 1},
    )  # fmt: skip
    both = {"found": checkpoint, "against": checkpoint, "longest": 20}
    weights = memory_of(config, [checkpoint], 20).weights
    demand = memory_of(config, [checkpoint, checkpoint], 20)
    assert demand.weights == 2 * weights and demand.gradients == 0 and demand.in_turns == weights
    large = [("the memory", 10**10)] * 2
    fits = on_nodes(devices.memory, config, *large, **both)
    assert fits.status == "ok" and f"weights {size(2 * weights)}" in fits.detail and "gradients" not in fits.detail
    small = on_nodes(devices.memory, config, *[("the memory", demand.total - 1)] * 2, **both)
    assert small.status == "warning" and str(small.remedy).startswith("it holds one model at a time")
    assert on_nodes(devices.memory, config, *[("the memory", weights)] * 2, **both).exit_code == 4
    once = on_nodes(node_files.model_cache, config, 10**12, 10**12, **both)
    other = replace(checkpoint, directory=Path(shutil.copytree(checkpoint.directory, tmp_path / "other")))
    twice = on_nodes(node_files.model_cache, config, 10**12, 10**12, found=checkpoint, against=other)
    sizes = [re.search(r"room for (.*) on", check.detail) for check in (once, twice)]
    assert sizes[0] is not None and sizes[1] is not None and sizes[0][1] != sizes[1][1]


def test_only_nodes_that_can_hold_an_actor_need_the_checkpoint(configured, checkpoint: Checkpoint):
    config = configured(cluster={"actors": 1, "cpus_per_actor": 2})
    small = [NODES[0], Node("cc", "head (10.0.0.3)", {"CPU": 0.0})]
    case = Case(config, config.cluster, None, False, 1.0, None, nodes=small, found=checkpoint)  # type: ignore[arg-type]
    assert doctor_nodes.nodes_with_room(case) == NODES[:1]


def test_a_cache_that_a_node_cannot_hold_is_named(configured, checkpoint: Checkpoint):
    config = configured(model={"cache_dir": "/scratch/models"})
    assert on_nodes(node_files.model_cache, config, 10**12, 10**12, found=checkpoint).ok
    check = on_nodes(node_files.model_cache, config, 7, None, found=checkpoint)
    assert check.status == "failed" and check.detail.startswith("model.cache_dir: got '/scratch/models'")
    assert "node first (10.0.0.1) has 7 B free, node second (10.0.0.2) cannot write it" in check.detail


def test_room_in_a_cache_is_known_before_it_is_made(tmp_path: Path):
    (tmp_path / "file").write_text("")
    assert node_files.cache_room(str(tmp_path / "not" / "there")) == shutil.disk_usage(tmp_path).free
    assert node_files.cache_room(str(tmp_path / "file" / "below")) is None


def test_a_device_too_small_for_an_actor_is_told_with_both_sizes(configured, checkpoint: Checkpoint):
    gpu = configured(cluster={"actors": 2, "cpus_per_actor": 1, "gpus_per_actor": 1})
    case = {"found": checkpoint, "longest": 20}
    large, small = ("H100", 80 * 10**9), ("H100", 10**5)
    fits = on_nodes(devices.memory, gpu, large, large, nodes=WITH_GPUS, **case)
    assert fits.ok and "weights" in fits.detail and "H100 of node first (10.0.0.1) has 80 GB" in fits.detail
    check = on_nodes(devices.memory, gpu, large, small, nodes=WITH_GPUS, **case)
    assert check.status == "failed" and check.exit_code == 4
    assert "H100 of node second (10.0.0.2) has 100 kB" in check.detail and "model.trainable" in str(check.remedy)


def test_actors_on_one_node_share_its_memory_and_half_a_gpu_has_half_of_it(configured, checkpoint: Checkpoint):
    case = {"found": checkpoint, "longest": 20}
    two = on_nodes(
        devices.memory, configured(cluster={"actors": 4}), ("the memory", 8 * 10**9), ("the memory", 10**10), **case
    )
    assert "the memory of node first (10.0.0.1) for each of 2 actors has 4 GB" in two.detail
    half = on_nodes(
        devices.memory,
        configured(cluster={"gpus_per_actor": 0.5}),
        ("A", 10**10),
        ("B", 2 * 10**10),
        nodes=WITH_GPUS,
        **case,
    )
    assert "A of node first (10.0.0.1) has 5 GB" in half.detail


def test_a_device_that_torch_does_not_see_on_its_node_is_told(configured, checkpoint: Checkpoint):
    config = configured(cluster={"gpus_per_actor": 1})
    blind, one = ClusterError("torch sees no CUDA device"), WITH_GPUS[:1]
    check = on_nodes(devices.memory, config, blind, nodes=one, found=checkpoint, longest=20)
    assert check.status == "failed" and "node first (10.0.0.1) could not say (torch sees no CUDA" in check.detail


def test_the_memory_of_this_machine_is_what_programs_can_have():
    name, free = devices.free_device(cuda=False)
    assert name == "the memory" and 10**8 < free <= psutil.virtual_memory().total


def test_actors_without_room_are_told_in_the_words_of_a_run(configured):
    config = configured(cluster={"gpus_per_actor": 1})
    case = Case(config, config.cluster, None, False, 1.0, None, nodes=NODES)  # type: ignore[arg-type]
    check = examine(Step("it", cluster.resources), case, set())
    assert check.detail == "cluster.gpus_per_actor: asked 2 x 1 GPU, the cluster has 0" and check.exit_code == 4
