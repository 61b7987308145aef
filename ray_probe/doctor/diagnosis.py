"""The steps of a diagnosis, and running them one by one."""

from collections.abc import Generator
from contextlib import ExitStack

from ray_probe.config.schema import ClusterConfig, ProbeConfig
from ray_probe.doctor import cluster, devices, files, machine, model, node_files, packages, token
from ray_probe.doctor.checks import Case, Check, Step, examine

SELF_TEST_S = 10.0
READ_S = 300.0  # a checkpoint is read once, for its fingerprint: 30 GB at 100 MB/s
LOOK_S = 20.0
OF_A = (
    Step("checkpoint A", files.against, limit_s=READ_S),
    Step("end of response A", files.end_of_response_of_a, ("checkpoint A",)),
    Step("same tokens", files.same_tokens, ("checkpoint", "checkpoint A", "prompts"), limit_s=READ_S),
)
"""Steps for the checkpoint A of a comparison."""


def _steps(config: ProbeConfig | None, address: str | None, load: bool) -> tuple[Step, ...]:
    """Return the steps in order: quick ones first, the cluster before torch is loaded."""
    versions, ray_token = Step("versions", packages.versions), Step("token", token.token)
    room = (Step("room for Ray", machine.room_for_ray),) if address is None else ()
    connected = ("token", *(step.name for step in room))
    torch, self_test = Step("torch", machine.torch_build), Step("self-test", machine.self_tested)
    no_run = Step("run", files.no_run)
    if config is None and address is None:
        return (versions, ray_token, *room, Step("Ray", cluster.ray_starts, connected), torch, self_test, no_run)
    joined = (
        Step("cluster", cluster.joined, connected),
        Step("packages on nodes", cluster.node_packages, ("cluster",)),
    )
    if config is None:
        return (versions, ray_token, *joined, torch, self_test, no_run)
    of_a = () if config.compare.against is None else OF_A
    loadable = ("checkpoint", "prompts", *(step.name for step in of_a))
    on_nodes = ("resources", "checkpoint", *(step.name for step in of_a[:1]))
    cache = (Step("model cache", node_files.model_cache, on_nodes),) if config.model.cache_dir else ()
    return (
        *(versions, ray_token, *room, *joined),
        Step("resources", cluster.resources, ("cluster",)),
        torch,
        Step("checkpoint", files.checkpoint, limit_s=READ_S),
        Step("end of response", files.end_of_response, ("checkpoint",)),
        Step("prompts", files.prompts, limit_s=READ_S),
        *of_a,
        Step("checkpoint on nodes", node_files.node_checkpoint, on_nodes),
        *cache,
        Step("memory", devices.memory, (*on_nodes, "prompts")),
        Step("model", model.loaded, loadable) if load else Step("model", model.not_loaded),
        Step("run directory", files.run_directory, limit_s=LOOK_S),
        Step("disk", files.disk, ("checkpoint", "run directory"), limit_s=LOOK_S),
        Step("shared directory", node_files.shared_directory, ("cluster", "run directory")),
        self_test,
    )


def diagnose(
    config: ProbeConfig | None = None,
    *,
    address: str | None = None,
    token_path: str | None = None,
    loopback: bool = False,
    self_test_s: float = SELF_TEST_S,
    load: bool = False,
) -> Generator[Check, None, None]:
    """Check the requirements of a run, one after the other as the caller iterates.

    Nothing remains: a Ray started for the diagnosis ends with the iteration. Close an iterator that is not exhausted.

    Args:
        config: of the planned run; None to check only packages, a Ray of this machine, and the self-test.
        address: without a config, a cluster to check instead: auto or host:port.
        token_path: token of a cluster that another ray_probe started.
        loopback: that cluster is on this machine.
        self_test_s: time limit of the self-test.
        load: load the model on this machine too, and process a few short responses.
    """
    held: set[str] = set()
    with ExitStack() as stack:
        where = config.cluster if config else ClusterConfig().model_copy(update={"address": address})
        case = Case(config, where, token_path, loopback, self_test_s, stack)
        for step in _steps(config, where.address, load):
            check = examine(step, case, held)
            if check.ok:
                held.add(check.name)
            yield check
