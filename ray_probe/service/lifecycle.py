"""Starting a service: what `up` does."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ray_probe.cluster.connection.shadows import refuse_shadows
from ray_probe.cluster.connection.shared_directory import warn_unless_shared
from ray_probe.cluster.controller_actor import CONTROLLER_LOCK, SERVICE_CONFIG
from ray_probe.config.loading import dump_yaml, load_config
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.state import STATE_FILE, ControllerState
from ray_probe.errors import ClusterError, ConfigError, NoClusterError, bad_value
from ray_probe.rollout.loader import check_fits_here
from ray_probe.run.directory import default_name
from ray_probe.run.prepared import PreparedRun, few_shards
from ray_probe.service import registry
from ray_probe.service.client import CLOSE_S, ProbeClient
from ray_probe.service.ending import forget_lost_head
from ray_probe.system.clock import utc_now
from ray_probe.system.digests import SUMS, record
from ray_probe.system.files import held, write_atomically
from ray_probe.system.signals import interrupted

POLL_S = 0.25
START_S = 600.0
UP_LOCK = "up.lock"

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Up:
    """A service that answers: where it is, and what it goes on with after a loss (0 at a first start)."""

    entry: registry.Entry
    queued: int


def up(config_path: Path, overrides: Sequence[str], name: str | None, tell: Tell) -> Up:
    """Start a service; returns when its first rollout actor is ready. What was started is ended again on failure.

    Args:
        config_path: YAML file that its measurements start from.
        overrides: `dotted.key=value` settings.
        name: of the service; None: `output.name`, else the file's.
        tell: told what happens.

    Raises:
        ConfigError: the request is wrong, or a service of that name is up already.
        ClusterError: no cluster, no room, or actors that do not start; with the cause.
    """
    from ray_probe.cluster.connection.connect import check_room
    from ray_probe.cluster.connection.demand import Demand

    config = load_config(config_path, overrides)
    name = name or config.output.name or default_name(config_path).rsplit("-", 3)[0]
    config = load_config(config_path, [*overrides, f"output.name={name}"])
    _refuse_second(name)
    refuse_shadows(config.cluster.runtime_env)
    check_room(config.cluster.address, Demand.of(config.cluster))
    from ray_probe.run.prepare import prepare  # brings transformers along

    prepared = prepare(config)
    check_fits_here(config, prepared.memory)
    if (warning := few_shards(config)) is not None:
        tell(f"warning: {warning}")
    directory = _directory(Path(prepared.config.output.dir), name)
    with held(directory / UP_LOCK, 0.0), ExitStack() as undo:
        with held(directory / CONTROLLER_LOCK, 0.0):  # of another service in this directory, on whatever cluster
            _written(prepared.config, directory)
        forget_lost_head(name)
        entry, stay = _reached(prepared.config, name, directory, undo, tell)
        entry, queued = _started(prepared, entry, tell)
        registry.register(entry)
        undo.pop_all()
        stay()
    return Up(entry, queued)


def _refuse_second(name: str) -> None:
    """Refuse the name of a service that is up, or may be: only of one that is known to be gone it is free again."""
    entry = registry.read(name)
    if entry is not None and entry.kind == "service" and entry.pid is None:
        try:
            with ProbeClient.connect(entry.address, entry.namespace, entry.name):
                pass
        except (NoClusterError, ConfigError):
            return  # neither its cluster nor its controller is there
        except ClusterError as error:
            remedy = f"a service of that name is listed as up on {entry.address}, and cannot be asked; choose another"
            raise ClusterError(bad_value("--name", name, f"{remedy} ({error})")) from None
    registry.refuse_second("--name", name)


def _directory(parent: Path, name: str) -> Path:
    """The service's directory: new, or that of an earlier life of it. Raises ConfigError when it cannot be used."""
    path = parent / name
    if path.exists() and not (path / STATE_FILE).exists() and any(path.iterdir()):
        raise ConfigError(bad_value("--name", name, f"{path} is there and is no service's; choose another name"))
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise ConfigError(bad_value("output.dir", str(parent), f"cannot be written ({error.strerror})")) from None
    board = ControllerState(path)  # a queue that cannot be read is told here
    board.actors = None  # as the configuration says, from now on
    board.save()
    return path


def _written(config: ProbeConfig, directory: Path) -> None:
    """Put the service's configuration where its controller finds it, now and when it is made again."""
    path, data = directory / SERVICE_CONFIG, dump_yaml(config).encode()
    write_atomically(path, data)
    (directory / SUMS).unlink(missing_ok=True)  # it lists nothing else, and may be damaged
    record(directory, {SERVICE_CONFIG: data})
    path.chmod(0o600)


def _reached(
    config: ProbeConfig, name: str, directory: Path, undo: ExitStack, tell: Tell
) -> tuple[registry.Entry, Callable[[], None]]:
    """Where the service will be: on the cluster that is given, or on a head that is started for it and then stays."""
    cluster = config.cluster
    if cluster.address is not None:
        from ray_probe.cluster.connection.join_check import find_address

        address = find_address(cluster.address)
        entry = registry.Entry(name, "service", address, cluster.namespace, None, False, str(directory), utc_now())
        return entry, lambda: None
    from ray_probe.cluster.connection.connect import start_head
    from ray_probe.cluster.connection.demand import Demand

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
    """Start the controller on the cluster's head and wait for the first rollout actor.

    Returns the entry with the address that the cluster's nodes know, and how many measurements wait.
    """
    from ray_probe.cluster.connection.connect import connected
    from ray_probe.cluster.connection.demand import Demand
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
            return replace(entry, address=info.address), _ready(client, tell)
        except BaseException:
            client.end_quietly(0.0 if interrupted() else CLOSE_S)
            raise


def _ready(client: ProbeClient, tell: Tell) -> int:
    """Wait for the first rollout actor, and report what that waits for. Raises what keeps it from starting."""
    status = client.status(START_S)  # the first answer waits for the runtime environment
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
    """How to ask, for people."""
    name, again = found.entry.name, found.queued
    told = [f"service {name!r} is up: {found.entry.address}, namespace {found.entry.namespace!r}"]
    told.append(f"files: {found.entry.directory}")
    told += [f"{again} measurements of before go on"] if again else []
    return [
        *told,
        f"measure:  ray-probe probe CHECKPOINT --wait --run {name}",
        f"ask:      ray-probe status|beta|variance|results|logs --run {name}",
        f"scale:    ray-probe scale N --run {name}",
        f"end:      ray-probe down --run {name}",
    ]
