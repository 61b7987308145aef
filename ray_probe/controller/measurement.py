"""Runs one measurement, for `run` and services alike.

Loads the checkpoint on the actors, creates or opens the run directory, runs the rounds, and writes the result with its
plots and report.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from ray_probe.config.loading import dump_yaml
from ray_probe.config.schema import ProbeConfig
from ray_probe.controller.run_log import (
    baseline_line,
    log_start,
    log_text,
    log_to,
    logged_to,
    logger,
    tell,
    warnings_to,
)
from ray_probe.errors import ProbeError
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.backend import LoadingBackend, StopCheck, Stopped
from ray_probe.run.directory import MANIFEST, RunDirectory, as_json
from ray_probe.run.manifest import Manifest, check_same_inputs
from ray_probe.run.preparation.prepared import PreparedRun
from ray_probe.run.progress import Listener
from ray_probe.run.result import Result
from ray_probe.system.failpoints import fail_at

HANDOVER_S = 10.0
"""Time that a controller may outlive its driver or head and still hold the run directory."""


@dataclass(frozen=True)
class Job:
    """A prepared measurement.

    Attributes:
        prepared: the checked run.
        resume: the run directory exists.
        command: the command line, for the manifest.
        cluster: facts about the cluster, for the manifest.
        notes: earlier messages, for the log.
    """

    prepared: PreparedRun
    resume: bool
    command: tuple[str, ...] = ()
    cluster: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure(
    job: Job,
    backend: LoadingBackend,
    listener: Listener,
    stop: StopCheck,
    on_open: Callable[[OfflineEntropyProbe], None] = lambda probe: None,
) -> Result:
    """Measures a checkpoint; returns the result, which is on disk with its plots.

    Args:
        job: the measurement.
        backend: the actors.
        listener: receives progress.
        stop: polled; once it is true, the work ends within a second.
        on_open: receives the probe once its directory exists, for queries.

    Raises:
        Stopped: `stop` was true; the result of the committed rounds is on disk.
        ProbeError: the measurement failed; likewise.
    """
    config = job.prepared.config
    both = "" if config.compare.against is None else f"{config.compare.against} and "
    tell(listener, f"loading {both}{config.model.path} on {backend.actors} rollout actors")
    with warnings_to(listener):
        backend.load(job.prepared, stop)
    if stop():
        raise Stopped("stopped before the first round")
    directory = _directory(job, backend)
    with directory.held(HANDOVER_S), logged_to(directory.path / "log.txt", job.notes):
        finished = directory.committed_rounds()
        passes = directory.manifest().pass_
        log_start(config, backend, len(finished), passes)
        log_text(job.prepared)
        if (gap := backend.info.cache_gap) > 0:
            tell(listener, f"warning: steps from this model's cache are {gap:.2g} nats a token from one pass over them")
        tell(listener, baseline_line(config))
        backend.open(directory, [entry.records for entry in finished], passes.held_positions)
        plan, eos, moved = job.prepared.plan, job.prepared.eos, backend.info.moved_share
        probe = OfflineEntropyProbe(config, plan, backend, directory, log_to(listener), stop, eos, moved)
        on_open(probe)
        return _finish(probe, directory)


def _finish(probe: OfflineEntropyProbe, directory: RunDirectory) -> Result:
    """Runs the probe; writes the result of the committed rounds also on failure."""
    try:
        result = probe.run()
        fail_at("plots_before_write")
        _show(result, directory)
        return result
    except (Stopped, ProbeError) as error:
        logger.error("ended after %d whole rounds: %s", probe.finished_rounds, error)
        if probe.finished_rounds:
            with contextlib.suppress(ProbeError, OSError):  # the first error counts
                _show(probe.finish(), directory)
        raise
    except Exception:
        logger.exception("ended after %d whole rounds by a fault of ray_probe", probe.finished_rounds)
        raise


def _show(result: Result, directory: RunDirectory) -> None:
    """Writes plots and report beside a result."""
    from ray_probe.page.report_file import write_run_report
    from ray_probe.report.plots import write_plots  # imports matplotlib

    rounds = directory.finished_rounds()
    write_plots(result, rounds, directory.path)
    write_run_report(result, rounds, directory.path)


def _directory(job: Job, backend: LoadingBackend) -> RunDirectory:
    """Creates the run directory, or opens the one to resume."""
    config = job.prepared.config
    assert config.output.name is not None
    if job.resume:
        return RunDirectory.open(Path(config.output.dir) / config.output.name)
    manifest = Manifest.of(job.prepared, backend.info, job.cluster, job.command)
    files = {"config.yaml": dump_yaml(config), MANIFEST: as_json(manifest.to_json())}
    return RunDirectory.create(Path(config.output.dir), config.output.name, files)


Prepare = Callable[[ProbeConfig, datetime | None], PreparedRun]


def prepared_again(directory: RunDirectory, config: ProbeConfig, prepare: Prepare) -> tuple[PreparedRun, list[str]]:
    """Prepares a run that is resumed; returns it with notes about changed versions.

    Raises:
        ConfigError: its inputs or settings have changed.
        InputError: its inputs have become unusable.
    """
    earlier = directory.manifest()
    prepared = prepare(config, None if earlier.created is None else datetime.fromisoformat(earlier.created))
    check_same_inputs(prepared, earlier)
    changes = earlier.changed_since(config.cluster.cpus_per_actor)
    return prepared, [
        f"since the run was started, {change}: the last bits of what follows may differ" for change in changes
    ]


