"""Drives one run from its request to its result.

A controller works as in a service, so that `status`, `scale` and the other queries work on a run.
"""

import os
import sys
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from ray_probe.cluster.connection.connect import check_room, connected, start_head
from ray_probe.cluster.connection.demand import Demand
from ray_probe.cluster.connection.shadows import refuse_shadows
from ray_probe.cluster.connection.shared_directory import warn_unless_shared
from ray_probe.cluster.head.head_monitor import LOST_S, OWN_LOST_S, HeadMonitor
from ray_probe.cluster.head.local_head import StartedHead
from ray_probe.config.loading import to_dict
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.measurement import HANDOVER_S, Job, prepared_again
from ray_probe.controller.outcome.reporter import Reporter
from ray_probe.controller.run_check import check_run
from ray_probe.errors import ClusterError, ConfigError, ProbeError
from ray_probe.http.server import forget_files
from ray_probe.rollout.loader import check_fits_here
from ray_probe.run.directory import RunDirectory
from ray_probe.run.preparation.prepared import PreparedRun, few_shards
from ray_probe.run.progress import Listener, Progress
from ray_probe.run.result import Result
from ray_probe.service import registry
from ray_probe.service.run_request import Run, RunRequest, resolve
from ray_probe.system import processes
from ray_probe.system.clock import utc_now
from ray_probe.system.signals import at_last, end_now, interrupted

if TYPE_CHECKING:
    from ray_probe.service.client import ProbeClient

SUBMIT_S = 60.0
REPORTS_S = 100.0
"""Time for what is called at a run's end; each call has its own time-out below this."""
STOP_S = 2.7
"""Time for an interrupted run to stop by itself; then it is killed."""


def execute(request: RunRequest, listener: Listener, run: Run) -> Result:
    """Runs a request; returns the result, which is on disk with its plots.

    Args:
        request: of the command line.
        listener: receives progress.
        run: filled in, also when the run is interrupted.
    """
    config, directory = resolve(request)
    refuse_shadows(config.cluster.runtime_env)
    notes = Notes(listener)
    run.directory = None if directory is None else directory.path
    with at_last(run.keep), ExitStack() as stack:
        stack.callback(run.keep)
        head = _started_here(config, stack)
        prepared = prepared_run(config, directory, notes)
        if (warning := few_shards(config)) is not None:
            notes.tell(f"warning: {warning}")
        if directory is not None and (result := finished_result(directory, prepared, notes)) is not None:
            notes.tell("every round of this run is finished; nothing is left to do")
            return result
        output = prepared.config.output
        run.path = Path(output.dir) / str(output.name)
        return _driven(prepared, directory is not None, run.path, head, notes, listener)


def _started_here(config: ProbeConfig, stack: ExitStack) -> StartedHead | None:
    # Ray starts while files are checked.
    if config.cluster.address is not None:
        return None
    head = start_head(Demand.of(config.cluster))
    stack.enter_context(at_last(head.kill))
    return stack.enter_context(closing(head))


class Notes:
    """Messages before the log exists, which receives them later."""

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self.texts: list[str] = []

    def tell(self, text: str) -> None:
        """Passes a message on, and keeps it for the log."""
        self.texts.append(text)
        self._listener(Progress.outside(text))


def prepared_run(config: ProbeConfig, directory: RunDirectory | None, notes: Notes) -> PreparedRun:
    """Returns the checked run, without a connection to the cluster."""
    if directory is None and config.cluster.address is not None:  # the checkpoint takes seconds
        check_room(config.cluster.address, Demand.of(config.cluster))
    from ray_probe.run.preparation.prepare import prepare

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


def finished_result(directory: RunDirectory, prepared: PreparedRun, notes: Notes) -> Result | None:
    """Returns the result of a run whose rounds are all finished, or None."""
    rounds = len(directory.finished_rounds())
    if not rounds or rounds != prepared.plan.round_count:
        return None
    try:
        result = directory.result()
    except ConfigError as error:
        notes.tell(f"{error}; it is computed from the committed rounds")
        return None
    return result if result is not None and result.counts.rounds == rounds else None


def _driven(
    prepared: PreparedRun, resume: bool, path: Path, own: StartedHead | None, notes: Notes, listener: Listener
) -> Result:
    """Connects, submits the run to a new controller, and follows it to its end."""
    from ray_probe.cluster.connection.nodes import this_node
    from ray_probe.cluster.controller_actor import ControllerSpec
    from ray_probe.cluster.controllers import create
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
        stack.callback(forget_files, path)  # of a web server, which ends with the run
        stack.enter_context(registry.registered(entry))
        stack.enter_context(at_last(lambda: registry.unregister(name)))
        stack.callback(lambda: client.end_quietly(0.0 if interrupted() else CLOSE_S))
        job = Job(prepared, resume, tuple(sys.argv), asdict(info), tuple(notes.texts))
        identity = controller.submit(to_dict(config), job, SUBMIT_S)
        try:
            return _followed(client, identity, path, own, listener)
        finally:
            _report(client, identity, config, notes)


def _report(client: "ProbeClient", identity: str, config: ProbeConfig, notes: Notes) -> None:
    """Report the end of a run to sinks and notifications.

    An interrupted run, or a lost one, has not ended.
    """
    if interrupted() or client.head_lost:
        return
    with suppress(ProbeError):  # the error that the run ends with counts
        info, result = client.measured(identity)
        if info.finished is not None:
            reporter = Reporter(config, client.name, None, lambda text: notes.tell(f"warning: {text}"))
            reporter.ended(info, result)
            reporter.close(REPORTS_S, interrupted)


def _followed(
    client: "ProbeClient", identity: str, path: Path, own: StartedHead | None, listener: Listener
) -> Result:
    """Returns the result; on Ctrl-C stops the run with its committed rounds kept."""
    from ray_probe.cluster.actors.calls import is_gone, is_silent
    from ray_probe.cluster.pool.death_report import autopsy

    try:
        return client.ended(identity, listener, interrupted)
    except ClusterError as error:
        if client.head_lost or is_silent(error):
            told = str(error)
            listener(Progress.outside(told))  # now, as Ray takes 5 s to leave a cluster without a head
            if own is not None:
                own.kill()
        elif error.__cause__ is not None and is_gone(error):
            told = f"controller: it is gone ({autopsy(error.__cause__).cause})"
        else:
            raise
        remedy = f"go on with run --resume {path}" if path.is_dir() else "nothing was measured; start it again"
        raise ClusterError(f"{told}; {remedy}") from error
    except KeyboardInterrupt:
        listener(Progress.outside("interrupted: keeping the committed rounds; interrupt again to end at once"))
        with suppress(ProbeError):  # it has ended, or its controller is gone
            client.stop(identity, STOP_S)
        if own is not None:
            end_now()  # its head ends with it
        raise
