"""One run from request to result: files checked, cluster reached, a controller given the work and followed.

The same controller that a service has drives the run, so that `status`, `scale` and the other queries work on it.
"""

import os
import sys
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_probe.cluster.connection.shadows import refuse_shadows
from ray_probe.cluster.connection.shared_directory import warn_unless_shared
from ray_probe.config.loading import load_config, to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.measurement import HANDOVER_S, Job, prepared_again
from ray_probe.controller.run_check import check_run
from ray_probe.errors import ClusterError, ConfigError, ProbeError, bad_value
from ray_probe.rollout.loader import check_fits_here
from ray_probe.run.directory import RunDirectory, default_name
from ray_probe.run.kept_rounds import write_kept_result
from ray_probe.run.manifest import FREE_SECTIONS
from ray_probe.run.prepared import PreparedRun, few_shards
from ray_probe.run.progress import Listener, Progress
from ray_probe.service import registry
from ray_probe.system import processes
from ray_probe.system.clock import utc_now
from ray_probe.system.signals import at_last, end_now, interrupted

if TYPE_CHECKING:
    from ray_probe.cluster.head.local_head import StartedHead

SUBMIT_S = 60.0
STOP_S = 2.7
"""For an interrupted run to stop by itself; what is left of it is ended then."""


@dataclass(frozen=True)
class RunRequest:
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
    """A run as far as it got.

    Attributes:
        directory: where its files are, once they are there.
        finished_rounds: its whole rounds that are committed.
        path: where its files will be.
    """

    directory: Path | None = None
    finished_rounds: int = 0
    path: Path | None = None

    def keep(self) -> None:
        """Take stock at the end of a run, however it ended; result.json is that of its finished rounds then."""
        self.directory = self.path if self.path is not None and self.path.is_dir() else self.directory
        if self.directory is None:
            return
        with suppress(ProbeError):  # what ended the run is the one thing to say
            self.finished_rounds = len(RunDirectory(self.directory).finished_rounds())
            if self.directory == self.path:
                write_kept_result(self.path)


def resolve(request: RunRequest) -> tuple[ProbeConfig, RunDirectory | None]:
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


def execute(request: RunRequest, listener: Listener, run: Run) -> dict[str, Any]:
    """Do what was asked; returns the result, which is on disk then, with its plots.

    Args:
        request: what to do.
        listener: told of progress.
        run: filled in as the run gets on, so that the caller knows what there is when it is interrupted.
    """
    config, directory = resolve(request)
    refuse_shadows(config.cluster.runtime_env)
    notes = _Notes(listener)
    run.directory = None if directory is None else directory.path
    with at_last(run.keep), ExitStack() as stack:
        stack.callback(run.keep)
        head = _started_here(config, stack)
        prepared = _prepared(config, directory, notes)
        if (warning := few_shards(config)) is not None:
            notes.tell(f"warning: {warning}")
        if directory is not None and (result := _done(directory, prepared, notes)) is not None:
            notes.tell("every round of this run is finished; nothing is left to do")
            return result
        output = prepared.config.output
        run.path = Path(output.dir) / str(output.name)
        return _driven(prepared, directory is not None, run.path, head, notes, listener)


def _started_here(config: ProbeConfig, stack: ExitStack) -> "StartedHead | None":
    """Ray on its way on this machine, where the configuration asks for that: it starts while files are checked."""
    from ray_probe.cluster.connection.connect import start_head
    from ray_probe.cluster.connection.demand import Demand

    if config.cluster.address is not None:
        return None
    head = start_head(Demand.of(config.cluster))
    stack.enter_context(at_last(head.kill))
    return stack.enter_context(closing(head))


class _Notes:
    """What is told before there is a log; it is written there later."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.texts: list[str] = []

    def tell(self, text: str) -> None:
        self.texts.append(text)
        self._listener(Progress.outside(text))


def _prepared(config: ProbeConfig, directory: RunDirectory | None, notes: _Notes) -> PreparedRun:
    """The run, checked as far as no connection to the cluster is needed."""
    from ray_probe.cluster.connection.connect import check_room
    from ray_probe.cluster.connection.demand import Demand

    if directory is None and config.cluster.address is not None:  # before what takes seconds: the checkpoint
        check_room(config.cluster.address, Demand.of(config.cluster))
    from ray_probe.run.prepare import prepare

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


def _done(directory: RunDirectory, prepared: PreparedRun, notes: _Notes) -> dict[str, Any] | None:
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


def _driven(
    prepared: PreparedRun, resume: bool, path: Path, own: "StartedHead | None", notes: _Notes, listener: Listener
) -> dict[str, Any]:
    """Connect, give a controller the work, and follow it to its end."""
    from ray_probe.cluster.connection.connect import connected
    from ray_probe.cluster.connection.demand import Demand
    from ray_probe.cluster.connection.nodes import this_node
    from ray_probe.cluster.controller_actor import ControllerSpec
    from ray_probe.cluster.controllers import create
    from ray_probe.cluster.head.head_monitor import LOST_S, OWN_LOST_S, HeadMonitor
    from ray_probe.service.client import CLOSE_S, ProbeClient

    config, name = prepared.config, path.name
    cluster = config.cluster
    check_fits_here(config, prepared.memory)
    if cluster.address is None:
        notes.tell("starting Ray on this machine")
    with ExitStack() as stack:
        info = stack.enter_context(
            connected(
                cluster.address, cluster.namespace, Demand.of(cluster), runtime_env=dict(cluster.runtime_env),
                checked=not resume, head=own, log=notes.tell,
            )
        )  # fmt: skip
        notes.tell(prepared.memory.note())
        warn_unless_shared(config, notes.tell)
        controller = create(ControllerSpec(name, to_dict(config), None, info.owned), this_node())
        stack.enter_context(at_last(controller.kill))
        lost_s, is_gone = (LOST_S, lambda: False) if own is None else (OWN_LOST_S, own.is_gone)
        head = HeadMonitor(info.address, lost_s, is_gone=is_gone)
        client = ProbeClient(controller, cluster.namespace, ExitStack(), head, "run")
        me = os.getpid()
        entry = registry.Entry(
            name, "run", info.address, cluster.namespace, info.token_path, info.owned, str(path), utc_now(), me,
            processes.created(me),
        )  # fmt: skip
        stack.enter_context(registry.registered(entry))
        stack.enter_context(at_last(lambda: registry.unregister(name)))
        stack.callback(lambda: client.end_quietly(0.0 if interrupted() else CLOSE_S))
        job = Job(prepared, resume, tuple(sys.argv), asdict(info), tuple(notes.texts))
        identity = controller.submit(to_dict(config), job, SUBMIT_S)
        return _followed(client, identity, path, own, listener)


def _followed(
    client: Any, identity: str, path: Path, own: "StartedHead | None", listener: Listener
) -> dict[str, Any]:
    """The result of the measurement; on Ctrl-C it is stopped with its whole rounds kept, which takes a moment."""
    from ray_probe.cluster.actors.calls import is_gone, is_silent
    from ray_probe.cluster.pool.death_report import autopsy

    try:
        result: dict[str, Any] = client.wait(identity, listener, interrupted)
        return result
    except ClusterError as error:
        if client.head_lost or is_silent(error):
            told = str(error)
            listener(Progress.outside(told))  # at once: leaving a cluster without a head takes Ray 5 s
            if own is not None:
                own.kill()
        elif error.__cause__ is not None and is_gone(error):
            told = f"controller: it is gone ({autopsy(error.__cause__).cause})"
        else:
            raise
        remedy = f"go on with run --resume {path}" if path.is_dir() else "nothing was begun yet: start it again"
        raise ClusterError(f"{told}; {remedy}") from error
    except KeyboardInterrupt:
        listener(Progress.outside("interrupted: keeping the whole rounds; once more to end at once"))
        with suppress(ProbeError):  # it has ended, or there is nobody to stop
            client.stop(identity, STOP_S)
        if own is not None:
            end_now()  # its Ray goes with it, so there is nothing to leave in order
        raise


