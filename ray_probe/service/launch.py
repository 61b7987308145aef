"""Starting a service and ending it: what `up` and `down` do."""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from ray_probe.cluster.controller_actor import CONTROLLER_LOCK, SERVICE_CONFIG
from ray_probe.cluster.environment import PREFIX
from ray_probe.config import ProbeConfig, dump_yaml, load_config
from ray_probe.digests import SUMS, record
from ray_probe.errors import ClusterError, ConfigError, ProbeError, bad_value
from ray_probe.files import held, write_atomically
from ray_probe.prepared import Prepared, few_shards
from ray_probe.run_directory import default_name
from ray_probe.runner import warn_unless_shared
from ray_probe.service import names, registry
from ray_probe.service.board import STATE_FILE, Board, utc_now
from ray_probe.service.client import ProbeClient

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
    from ray_probe.cluster.connection import Demand, check_room

    config = load_config(config_path, overrides)
    name = name or config.output.name or default_name(config_path).rsplit("-", 3)[0]
    config = load_config(config_path, [*overrides, f"output.name={name}"])
    _refuse_second(name)
    check_room(config.cluster.address, Demand.of(config.cluster))
    from ray_probe.preflight import prepare  # brings transformers along

    prepared = prepare(config)
    if (warning := few_shards(config)) is not None:
        tell(f"warning: {warning}")
    directory = _directory(Path(prepared.config.output.dir), name)
    with held(directory / UP_LOCK, 0.0), ExitStack() as undo:
        with held(directory / CONTROLLER_LOCK, 0.0):  # of another service in this directory, on whatever cluster
            _written(prepared.config, directory)
        _forget_lost_head(name)
        entry, stay = _reached(prepared.config, name, directory, undo, tell)
        queued = _started(prepared, entry, tell)
        registry.register(entry)
        undo.pop_all()
        stay()
    return Up(entry, queued)


def down(name: str | None, tell: Tell, address: str | None = None, namespace: str | None = None) -> str:
    """End a service, its actors and the head that it owns; returns its name.

    Args:
        name: of the service; None where only one is up.
        tell: told what happens.
        address: of the cluster of a service that is not in this user's registry; its head, if it owns one, stays.
        namespace: there; None: ray_probe.

    Raises:
        ConfigError: there is none of that name, or it is a run.
        ClusterError: it cannot be reached, and its cluster is not its own.
    """
    if address is not None:
        if name is None:
            raise ConfigError("--run: name the service that is to be ended on that cluster")
        place = registry.Entry(name, "service", address, namespace or "ray_probe", None, False, "", utc_now())
        _ended(place, tell)
        return name
    entry = registry.choose(name) if name is None else registry.read(name) or registry.choose(name)
    if entry.kind != "service":
        raise ConfigError(bad_value("--run", entry.name, f"it is a run, process {entry.pid}; end it with Ctrl-C there"))
    if not entry.gone:
        try:
            _ended(entry, tell)
        except ClusterError as error:
            if entry.pid is None:
                registry.unregister(entry.name)
                raise ClusterError(f"{error}; {entry.name!r} is no longer listed as up") from None
            tell(f"the service does not answer ({error}); its head is ended")
    if entry.pid is not None:
        from ray_probe.cluster import head

        head.end(entry.pid, entry.pid_created)
    _forget_lost_head(entry.name)
    registry.unregister(entry.name)
    return entry.name


def _ended(entry: registry.Entry, tell: Tell) -> None:
    """End a service's actors on its cluster, be its controller alive or not."""
    import ray

    from ray_probe.cluster.connection import connected
    from ray_probe.cluster.controller_actor import end_children, named_actors

    with connected(
        entry.address, entry.namespace, None, token_path=entry.token_path, loopback=entry.loopback, log=lambda _: None
    ):
        if names.controller(entry.name) not in named_actors(entry.namespace):
            tell("its controller is gone; what else there is of it is ended")
            end_children(entry.name, entry.namespace)
            return
        handle = ray.get_actor(names.controller(entry.name), namespace=entry.namespace)
        if not ProbeClient(handle, entry.name, entry.namespace, ExitStack()).end():
            tell("what was at work did not stop in time; its actors were ended")


def _refuse_second(name: str) -> None:
    entry = registry.read(name)
    if entry is not None and entry.kind == "service" and entry.pid is None and not _answers(entry):
        return
    registry.refuse_second("--name", name)


def _answers(entry: registry.Entry) -> bool:
    """Whether a service on a cluster that is not its own is still there."""
    try:
        with ProbeClient.connect(entry.address, entry.namespace, entry.name):
            return True
    except ProbeError:
        return False


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
    board = Board(path)  # a queue that cannot be read is told here
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


def _forget_lost_head(name: str) -> None:
    """Remove the temp dir, with the token, that a head of this service left when it was killed."""
    entry = registry.read(name)
    if entry is not None and entry.gone and entry.loopback and entry.token_path is not None:
        left = Path(entry.token_path).parent
        if left.name.startswith(PREFIX) and left.is_dir() and left.stat().st_uid == os.getuid():
            shutil.rmtree(left, ignore_errors=True)


def _reached(
    config: ProbeConfig, name: str, directory: Path, undo: ExitStack, tell: Tell
) -> tuple[registry.Entry, Callable[[], None]]:
    """Where the service will be: on the cluster that is given, or on a head that is started for it and then stays."""
    cluster = config.cluster
    if cluster.address is not None:
        from ray_probe.cluster.reach import find_address

        address = find_address(cluster.address)
        entry = registry.Entry(name, "service", address, cluster.namespace, None, False, str(directory), utc_now())
        return entry, lambda: None
    from ray_probe.cluster import head

    tell("starting Ray on this machine")
    starting = head.start(cluster.slots, cluster.cpus_per_actor, cluster.gpus_per_actor, directory)
    started = starting.head
    undo.callback(head.end, started.pid, started.created)
    entry = registry.Entry(
        name, "service", started.address, cluster.namespace, started.token_path, True, str(directory), utc_now(),
        started.pid, started.created,
    )  # fmt: skip
    return entry, starting.stay


def _started(prepared: Prepared, entry: registry.Entry, tell: Tell) -> int:
    """Start the controller on the cluster's head and wait for the first rollout actor; returns how many wait."""
    from ray_probe.cluster.connection import Demand, connected
    from ray_probe.cluster.controller_actor import Spec, create, named_actors
    from ray_probe.cluster.placement import head_node

    cluster, name = prepared.config.cluster, entry.name
    with connected(
        entry.address, entry.namespace, Demand.of(cluster), runtime_env=dict(cluster.runtime_env),
        token_path=entry.token_path, loopback=entry.loopback, checked=cluster.address is not None, log=tell,
    ):  # fmt: skip
        if names.controller(name) in named_actors(entry.namespace):
            remedy = f"a service of that name is up on {entry.address}; choose another, or end it with `down`"
            raise ConfigError(bad_value("--name", name, remedy))
        warn_unless_shared(prepared.config, tell)
        tell(f"memory of an actor: {prepared.memory.line()}")
        tell(f"loading {prepared.config.model.path} on {cluster.actors} rollout actors")
        controller = create(Spec(name, None, entry.directory, entry.loopback), head_node())
        client = ProbeClient(controller, name, entry.namespace, ExitStack())
        try:
            return _ready(client)
        except BaseException:
            client.end_quietly()
            raise


def _ready(client: ProbeClient) -> int:
    """Wait for the first rollout actor. Raises what keeps it from starting."""
    while True:
        status = client.status(START_S)  # the first answer waits for the runtime environment
        if status.actors_alive:
            return len(status.queued) + (status.measurement is not None)
        if (error := client.start_error()) is not None:
            raise error
        time.sleep(POLL_S)


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
