"""Starts a service for `up`."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ray_probe.cluster.connection.addresses import find_address
from ray_probe.cluster.connection.connect import check_room, connected, start_head
from ray_probe.cluster.connection.demand import Demand
from ray_probe.cluster.connection.shadows import refuse_shadows
from ray_probe.cluster.connection.shared_directory import warn_unless_shared
from ray_probe.cluster.controller_actor import CONTROLLER_LOCK
from ray_probe.config.loading import load_config
from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import ClusterError, ConfigError, NoClusterError, bad_value
from ray_probe.rollout.loader import check_fits_here
from ray_probe.run.directory import default_name
from ray_probe.run.preparation.prepared import PreparedRun, few_shards
from ray_probe.service import registry
from ray_probe.service.client import CLOSE_S, ProbeClient
from ray_probe.service.ending import forget_lost_head
from ray_probe.service.service_directory import prepare_directory, write_config
from ray_probe.system.clock import utc_now
from ray_probe.system.files import held
from ray_probe.system.signals import interrupted

POLL_S = 0.25
START_S = 600.0
UP_LOCK = "up.lock"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Up:
    """A service that answers.

    Attributes:
        entry: of the registry.
        queued: number of earlier measurements that it resumes.
    """

    entry: registry.Entry
    queued: int


def up(config_path: Path, overrides: Sequence[str], name: str | None, tell: Tell) -> Up:
    """Starts a service; returns when its first rollout actor is ready.

    Ends on failure whatever it started.

    Args:
        config_path: YAML file with the default configuration of its measurements.
        overrides: `dotted.key=value` settings.
        name: of the service; None: `output.name`, else the file's.
        tell: receives messages.

    Raises:
        ConfigError: the request is wrong, or a service of that name is up.
        ClusterError: no cluster, no room, or actors that do not start.
    """
    config = load_config(config_path, overrides)
    name = name or config.output.name or default_name(config_path).rsplit("-", 3)[0]
    config = load_config(config_path, [*overrides, f"output.name={name}"])
    refuse_live_name(name)
    refuse_shadows(config.cluster.runtime_env)
    check_room(config.cluster.address, Demand.of(config.cluster))
    from ray_probe.run.preparation.prepare import prepare  # imports transformers

    prepared = prepare(config)
    check_fits_here(config, prepared.memory)
    if (warning := few_shards(config)) is not None:
        tell(f"warning: {warning}")
    directory = prepare_directory(Path(prepared.config.output.dir), name)
    with held(directory / UP_LOCK, 0.0), ExitStack() as undo:
        with held(directory / CONTROLLER_LOCK, 0.0):  # held by a service in this directory on any cluster
            write_config(prepared.config, directory)
        forget_lost_head(name)
        entry, stay = _reached(prepared.config, name, directory, undo, tell)
        entry, queued = _started(prepared, entry, tell)
        registry.register(entry)
        undo.pop_all()
        stay()
    return Up(entry, queued)


def refuse_live_name(name: str) -> None:
    """Raises ClusterError or ConfigError for the name of a service that may be up."""
    entry = registry.read(name)
    if entry is not None and entry.kind == "service" and entry.pid is None:
        try:
            with ProbeClient.connect(entry.address, entry.namespace, entry.name):
                pass
        except (NoClusterError, ConfigError):
            return  # its cluster or its controller is gone
        except ClusterError as error:
            remedy = f"a service of that name is listed as up on {entry.address}, and cannot be asked; choose another"
            raise ClusterError(bad_value("--name", name, f"{remedy} ({error})")) from None
    registry.refuse_second("--name", name)


def _reached(
    config: ProbeConfig, name: str, directory: Path, undo: ExitStack, tell: Tell
) -> tuple[registry.Entry, Callable[[], None]]:
    """Returns the service's entry, and a function that lets a new head stay."""
    cluster = config.cluster
    if cluster.address is not None:
        address = find_address(cluster.address)
        entry = registry.Entry(name, "service", address, cluster.namespace, None, False, str(directory), utc_now())
        return entry, lambda: None
    tell("starting Ray on this machine")
    starting = start_head(Demand.of(cluster), checked=True, log=directory / "head.log")
    undo.callback(starting.close)
    started = starting.ready()
    entry = registry.Entry(
        name, "service", started.address, cluster.namespace, started.token_path, True, str(directory), utc_now(),
        started.pid, started.created,
    )  # fmt: skip
    return entry, starting.stay


def _started(prepared: PreparedRun, entry: registry.Entry, tell: Tell) -> tuple[registry.Entry, int]:
    """Starts the controller on the head node and waits for the first rollout actor.

    Returns the entry with the address that the cluster's nodes know, and the number of open measurements.
    """
    from ray_probe.cluster.connection.nodes import head_node
    from ray_probe.cluster.controller_actor import ControllerSpec
    from ray_probe.cluster.controllers import create

    cluster, name = prepared.config.cluster, entry.name
    with connected(
        entry.address, entry.namespace, Demand.of(cluster), runtime_env=dict(cluster.runtime_env),
        token_path=entry.token_path, loopback=entry.loopback, checked=cluster.address is not None, log=tell,
    ) as info:  # fmt: skip
        controller = create(ControllerSpec(name, None, entry.directory, entry.loopback), head_node())
        client = ProbeClient(controller, entry.namespace, ExitStack())
        try:
            warn_unless_shared(prepared.config, tell)
            tell(prepared.memory.note())
            tell(f"loading {prepared.config.model.path} on {cluster.actors} rollout actors")
            return replace(entry, address=info.address), wait_until_ready(client, tell)
        except BaseException:
            client.end_quietly(0.0 if interrupted() else CLOSE_S)
            raise


def wait_until_ready(client: ProbeClient, tell: Tell) -> int:
    """Waits for the first rollout actor; returns the number of open measurements.

    Raises the error that keeps the service from starting.
    """
    status = client.status(START_S)  # the first answer comes after the runtime environment is built
    reported = set(status.warnings)
    while True:
        for warning in [line for line in status.warnings if line not in reported]:
            reported.add(warning)
            tell(warning)
        if status.actors_alive:
            return len(status.queued) + (status.measurement is not None)
        if (error := client.start_error()) is not None:
            raise error
        time.sleep(POLL_S)
        status = client.status()


def lines(found: Up) -> list[str]:
    """Returns what `up` prints at its end."""
    name, queued = found.entry.name, found.queued
    shown = [f"service {name!r} is up: {found.entry.address}, namespace {found.entry.namespace!r}"]
    shown.append(f"files: {found.entry.directory}")
    shown += [f"{queued} earlier measurements resume"] if queued else []
    return [
        *shown,
        f"measure:  ray-probe probe CHECKPOINT --wait --run {name}",
        f"ask:      ray-probe status|beta|variance|results|logs --run {name}",
        f"scale:    ray-probe scale N --run {name}",
        f"end:      ray-probe down --run {name}",
    ]
