"""One run from request to result: files checked, cluster reached, a controller given the work and followed.

The same controller that a service has drives the run, so that `status`, `scale` and the other queries work on it.
"""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_probe.config import ProbeConfig, load_config, to_dict
from ray_probe.errors import ClusterError, ConfigError, bad_value
from ray_probe.interrupts import interrupted
from ray_probe.measurement import HANDOVER_S, Job, prepared_again
from ray_probe.prepared import FREE_SECTIONS, Prepared, few_shards
from ray_probe.progress import Listener, Progress
from ray_probe.run_check import check_run
from ray_probe.run_directory import RunDirectory, default_name
from ray_probe.service import registry
from ray_probe.service.board import utc_now

STOP_S = 60.0


@dataclass(frozen=True)
class Request:
    """What the command line asked for.

    Attributes:
        config: YAML file, or None to resume.
        resume: directory of the run to go on with, or None.
        overrides: `dotted.key=value` settings, applied in order.
    """

    config: Path | None
    resume: Path | None
    overrides: tuple[str, ...]


@dataclass
class Run:
    """A run as far as it got: where its files are once it has a place, and its whole rounds that are committed."""

    directory: Path | None = None
    finished_rounds: int = 0


def resolve(request: Request) -> tuple[ProbeConfig, RunDirectory | None]:
    """The configuration of a request, and the directory that a resumed run goes on in.

    Raises:
        InputError: what is wrong, in one line.
    """
    if (request.config is None) == (request.resume is None):
        raise ConfigError("CONFIG: give either a config file or --resume RUN_DIR")
    if request.config is not None:
        config = load_config(request.config, request.overrides)
        if config.output.name is None:
            named = config.output.model_copy(update={"name": default_name(request.config)})
            config = config.model_copy(update={"output": named})
        return config, None
    assert request.resume is not None
    for override in request.overrides:
        if override.split(".", 1)[0] not in FREE_SECTIONS:
            raise ConfigError(bad_value("--set", override, "a resumed run takes only cluster.* and output.* settings"))
        if override.split("=", 1)[0] in ("output.dir", "output.name"):
            raise ConfigError(bad_value("--set", override, "a resumed run stays in its directory; leave this out"))
    directory = RunDirectory.open(request.resume.resolve())
    directory.check_start()
    config = load_config(directory.config, request.overrides)
    here = config.output.model_copy(update={"dir": str(directory.path.parent), "name": directory.path.name})
    return config.model_copy(update={"output": here}), directory


def execute(request: Request, listener: Listener, run: Run) -> dict[str, Any]:
    """Do what was asked; returns the result, which is on disk then, with its plots.

    Args:
        request: what to do.
        listener: told of progress.
        run: filled in as the run gets on, so that the caller knows what there is when it is interrupted.
    """
    config, directory = resolve(request)
    notes = _Notes(listener)
    prepared = _prepared(config, directory, notes)
    if (warning := few_shards(config)) is not None:
        notes.tell(f"warning: {warning}")
    if directory is not None and (result := _done(directory, prepared, notes)) is not None:
        run.directory = directory.path
        notes.tell("every round of this run is finished; nothing is left to do")
        return result
    output = prepared.config.output
    path = Path(output.dir) / str(output.name)
    run.directory = None if directory is None else path
    try:
        return _driven(prepared, directory is not None, path, notes, listener)
    finally:
        if path.is_dir():
            run.directory = path
            run.finished_rounds = len(RunDirectory(path).finished_rounds())


class _Notes:
    """What is told before there is a log; it is written there later."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.texts: list[str] = []

    def tell(self, text: str) -> None:
        self.texts.append(text)
        self._listener(Progress.outside(text))


def _prepared(config: ProbeConfig, directory: RunDirectory | None, notes: _Notes) -> Prepared:
    """The run, checked as far as no connection to the cluster is needed."""
    from ray_probe.cluster.connection import Demand, check_room

    if directory is None:  # before what takes seconds: the import of transformers, the checkpoint
        check_room(config.cluster.address, Demand.of(config.cluster))
    from ray_probe.preflight import prepare

    if directory is None:
        prepared = prepare(config)
        RunDirectory.check_free(Path(prepared.config.output.dir), str(config.output.name))
        registry.refuse_second("output.name", str(config.output.name))
        return prepared
    with directory.held(HANDOVER_S, lambda holder: notes.tell(f"{holder} is driving this run; waiting for its end")):
        check_run(directory, notes.tell)  # before Ray is started; the controller holds the directory while it works
    prepared, changes = prepared_again(directory, config, prepare)
    for change in changes:
        notes.tell(change)
    return prepared


def _done(directory: RunDirectory, prepared: Prepared, notes: _Notes) -> dict[str, Any] | None:
    """The result of a run whose rounds are all finished, or None."""
    rounds = len(directory.finished_rounds())
    if not rounds or rounds != prepared.plan.round_count:
        return None
    try:
        result = directory.result()
    except ConfigError as error:
        notes.tell(f"{error}; the committed rounds give it again")
        return None
    return result if result is not None and result["counts"]["rounds"] == rounds else None


def _driven(prepared: Prepared, resume: bool, path: Path, notes: _Notes, listener: Listener) -> dict[str, Any]:
    """Connect, give a controller the work, and follow it to its end."""
    from ray_probe.cluster.calls import ask
    from ray_probe.cluster.connection import Demand, connected
    from ray_probe.cluster.controller_actor import create, spec_of_run
    from ray_probe.cluster.head_watch import LOST_S, OWN_LOST_S, HeadWatch
    from ray_probe.cluster.placement import this_node
    from ray_probe.service.client import ProbeClient

    config, name = prepared.config, path.name
    cluster = config.cluster
    if cluster.address is None:
        notes.tell("starting Ray on this machine")
    with ExitStack() as stack:
        info = stack.enter_context(
            connected(
                cluster.address, cluster.namespace, Demand.of(cluster), runtime_env=dict(cluster.runtime_env),
                checked=not resume, log=notes.tell,
            )
        )  # fmt: skip
        notes.tell(f"memory of an actor: {prepared.memory.line()}")
        warn_unless_shared(config, notes.tell)
        controller = create(spec_of_run(name, config, info.owned), this_node())
        head = HeadWatch(info.address, OWN_LOST_S if info.owned else LOST_S)
        client = ProbeClient(controller, name, cluster.namespace, ExitStack(), head)
        me = os.getpid()
        entry = registry.Entry(
            name, "run", info.address, cluster.namespace, info.token_path, info.owned, str(path), utc_now(), me,
            registry.created(me),
        )  # fmt: skip
        stack.enter_context(registry.registered(entry))
        stack.callback(client.end_quietly)
        job = Job(prepared, resume, tuple(sys.argv), asdict(info), tuple(notes.texts))
        identity = ask(controller, name, "submit", to_dict(config), job, deadline_s=STOP_S)
        return _followed(client, identity, path, listener)


def warn_unless_shared(config: ProbeConfig, tell: Callable[[str], None]) -> None:
    """On several nodes: say which do not see the run directory. Only its own node writes there, so a run goes on."""
    from ray_probe.cluster.survey import alive_nodes
    from ray_probe.shared_storage import check_shared

    nodes = alive_nodes()
    blind = check_shared(Path(config.output.dir), nodes) if len(nodes) > 1 else []
    if blind:
        names = ", ".join(node.name for node in blind)
        tell(f"warning: output.dir {config.output.dir} is not seen on {names}: the run is lost with this node")


def _followed(client: Any, identity: str, path: Path, listener: Listener) -> dict[str, Any]:
    """The result of the measurement; on Ctrl-C it is stopped with its whole rounds kept, which takes a moment."""
    from ray.exceptions import ActorDiedError

    from ray_probe.cluster.autopsy import autopsy

    try:
        result: dict[str, Any] = client.wait(identity, listener, interrupted)
        return result
    except ClusterError as error:
        if client.head_lost:
            told = str(error)
        elif isinstance(error.__cause__, ActorDiedError):
            told = f"controller: it is gone ({autopsy(error.__cause__).cause})"
        else:
            raise
        remedy = f"go on with run --resume {path}" if path.is_dir() else "nothing was begun yet: start it again"
        raise ClusterError(f"{told}; {remedy}") from error
    except KeyboardInterrupt:
        listener(Progress.outside("interrupted: keeping the whole rounds; once more to end at once"))
        with suppress(ClusterError):  # there is nobody to stop
            client.cancel(identity)
            client.wait_until_ended(identity, STOP_S)
        raise


def overrides(settings: Sequence[str], actors: str | None, address: str | None, out: Path | None) -> tuple[str, ...]:
    """The settings of a command line: `--set` first, then the options that stand for a key."""
    named = {"cluster.actors": actors, "cluster.address": address, "output.dir": out}
    return (*settings, *(f"{key}={value}" for key, value in named.items() if value is not None))
