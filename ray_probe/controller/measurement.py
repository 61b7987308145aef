"""One measurement from a checked request to its result, in the process that drives it: without ray, without torch.

`run` and the service both work this way: the checkpoint is loaded on the actors, the run directory is made or gone on
with, the rounds are worked off, the result and its plots are written.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

from ray_probe.checkpoints.eos import KEY as EOS_KEY
from ray_probe.checkpoints.files import some
from ray_probe.config.schema import ProbeConfig, dump_yaml
from ray_probe.errors import ProbeError
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.run.backend import Backend, Stopped
from ray_probe.run.directory import RunDirectory, as_json
from ray_probe.run.forward_passes import Pass
from ray_probe.run.prepared import Prepared, changed_since, check_same_inputs, manifest
from ray_probe.run.progress import Listener, Progress
from ray_probe.system.failpoints import fail_at

logger = logging.getLogger("ray_probe")
HANDOVER_S = 10.0
"""How long a controller may outlive its driver, or the head of its cluster, and still hold the run directory."""

Stop = Callable[[], bool]


class Loading(Backend, Protocol):
    """A backend that loads checkpoints, one after the other."""

    @property
    def info(self) -> Mapping[str, Any]:
        """What a started actor said of itself: layout, EOS ids, device, threads."""
        ...

    def load(self, prepared: Prepared, stop: Stop) -> None:
        """Have the actors load the checkpoint; returns when one is ready, or `stop` says so."""
        ...

    def open(self, directory: RunDirectory, finished: Sequence[Sequence[int]], held_positions: int = 0) -> None:
        """Start on a run directory: the fitter on its ledger, the writer on its gradients.

        Args:
            directory: of the run.
            finished: shards of each round that a resumed run keeps.
            held_positions: whose graphs an actor may hold (see `Pass`).
        """
        ...


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Attributes:
        prepared: the checked run.
        resume: go on in the run directory that is there.
        command: the command line that asked, for the manifest.
        cluster: what is known of the cluster, for the manifest.
        notes: what happened before the run directory was there, for its log.
    """

    prepared: Prepared
    resume: bool
    command: tuple[str, ...] = ()
    cluster: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure(
    job: Job,
    backend: Loading,
    listener: Listener,
    stop: Stop,
    on_open: Callable[[OfflineEntropyProbe], None] = lambda probe: None,
) -> dict[str, Any]:
    """Measure a checkpoint; returns the result, which is on disk then, with its plots.

    Args:
        job: what to measure.
        backend: where.
        listener: told of progress.
        stop: asked often; once it is true, the work ends within a second.
        on_open: given the probe once its directory is there, for questions while it works.

    Raises:
        Stopped: `stop` was true; what the finished rounds give is written.
        ProbeError: the measurement failed; likewise.
    """
    config = job.prepared.config
    tell(listener, f"loading {config.model.path} on {backend.actors} rollout actors")
    with _warnings_to(listener):
        backend.load(job.prepared, stop)
    if stop():
        raise Stopped("stopped before the first round")
    directory = _directory(job, backend)
    with directory.held(HANDOVER_S), logged_to(directory.path / "log.txt", job.notes):
        finished = directory.committed_rounds()
        passes = Pass.from_json(directory.read_json("manifest.json")["pass"])
        _log_start(config, backend, len(finished), passes)
        _log_text(job.prepared)
        if (gap := backend.info["cache_gap"]) > 0:
            tell(listener, f"warning: steps from this model's cache are {gap:.2g} nats a token from one pass over them")
        backend.open(directory, [list(line["records"]) for line in finished], passes.held_positions)
        eos = job.prepared.eos.to_json()
        probe = OfflineEntropyProbe(config, job.prepared.plan, backend, directory, _logging(listener), stop, eos)
        on_open(probe)
        return _finish(probe, directory)


def _finish(probe: OfflineEntropyProbe, directory: RunDirectory) -> dict[str, Any]:
    """Run to the end; when stopped or failed, write what the finished rounds give before passing that on."""
    from ray_probe.report.plots import write_plots  # brings matplotlib along

    try:
        result = probe.run()
        fail_at("plots_before_write")
        write_plots(result, directory.finished_rounds(), directory.path)
        return result
    except (Stopped, ProbeError) as error:
        logger.error("ended after %d whole rounds: %s", probe.finished_rounds, error)
        if probe.finished_rounds:
            with contextlib.suppress(ProbeError, OSError):  # a full disk, say: the first error is the one to tell
                write_plots(probe.finish(), directory.finished_rounds(), directory.path)
        raise
    except Exception:
        logger.exception("ended after %d whole rounds by a fault of ray_probe", probe.finished_rounds)
        raise


def _directory(job: Job, backend: Loading) -> RunDirectory:
    """The run directory: made, with configuration and manifest in it, or the one to go on with."""
    config = job.prepared.config
    assert config.output.name is not None
    if job.resume:
        return RunDirectory.open(Path(config.output.dir) / config.output.name)
    about = manifest(job.prepared, dict(backend.info), dict(job.cluster)) | {"command": list(job.command)}
    return RunDirectory.create(
        Path(config.output.dir), config.output.name, {"config.yaml": dump_yaml(config), "manifest.json": as_json(about)}
    )


Prepare = Callable[[ProbeConfig, datetime | None], Prepared]


def prepared_again(directory: RunDirectory, config: ProbeConfig, prepare: Prepare) -> tuple[Prepared, list[str]]:
    """A run that was begun, checked to be the same still; and what may make its last bits differ, one line each.

    Raises:
        ConfigError: its inputs or settings have changed.
        InputError: they cannot be used any more.
    """
    earlier = directory.read_json("manifest.json")
    created = earlier.get("created")
    prepared = prepare(config, None if created is None else datetime.fromisoformat(created))
    check_same_inputs(prepared, earlier)
    changes = changed_since(earlier, config.cluster.cpus_per_actor)
    return prepared, [
        f"since the run was started, {change}: the last bits of what follows may differ" for change in changes
    ]


def _log_start(config: ProbeConfig, backend: Loading, finished: int, passes: Pass) -> None:
    estimator, baseline = config.estimator, config.estimator.baseline
    logger.info(
        "x_estimator_mode=%s baseline.mode=%s baseline.fit=%s features=%s ridge_lambda=%g",
        estimator.x_estimator_mode, baseline.mode, baseline.fit, ",".join(baseline.features), baseline.ridge_lambda,
    )  # fmt: skip
    logger.info(
        "actors=%d device=%s parameters=%d first round=%d of %s",
        backend.actors, backend.info["device"], backend.layout.size, finished + 1, config.batch.rounds,
    )  # fmt: skip
    logger.info("pass=%s (%s)", passes.name, passes.why)
    if frozen := backend.info["frozen"]:
        logger.info(
            "model.trainable=%s leaves out %d parameters that the architecture has frozen: %s",
            config.model.trainable, len(frozen), some(frozen),
        )  # fmt: skip
    if backend.info["why_no_head"]:
        logger.info("teacher forcing holds the logits of a micro-batch: %s", backend.info["why_no_head"])
    if not backend.info["takes_padding"]:
        logger.info("padding changes what this model says: prompts of one length are sampled at once, and no others")
    if baseline.mode != "none" and baseline.fit == "in_sample":
        logger.warning("estimator.baseline.fit=in_sample biases the gradient by O(1/N); leave_one_out does not")


def _log_text(prepared: Prepared) -> None:
    """Log whose tokenizer and chat template are in use, and what ends a response."""
    checkpoint, eos, after_eos = prepared.checkpoint, prepared.eos, prepared.prompts.after_eos
    if checkpoint.adapter is not None:
        template = checkpoint.template_from or "neither"
        logger.info("tokenizer from %s, chat template from %s", checkpoint.tokenizer_from, template)
    logger.info("responses end at %s", eos.line())
    if differences := eos.differences():
        logger.warning("%s; not used, %s decides", differences, EOS_KEY)
    if after_eos:
        logger.warning("%d prompts end with an EOS token: their responses begin after the end of a text", after_eos)


def tell(listener: Listener, text: str) -> None:
    """Tell of what happens outside rounds: to the log, and as progress."""
    logger.info(text)
    listener(Progress.outside(text))


@contextlib.contextmanager
def _warnings_to(listener: Listener) -> Iterator[None]:
    """Report what is logged as a warning in the block: before the first round, nothing else reports it."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: listener(Progress.outside(record.getMessage()))  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def _logging(listener: Listener) -> Listener:
    """Write notes, and the end of each round, into the log too."""

    def listen(progress: Progress) -> None:
        if progress.note is not None:
            logger.warning(progress.note)
        elif progress.accumulated == progress.shards > 0:
            logger.info(
                "round %d: gradients of %d shards are in, %d tokens so far, beta version %d",
                progress.round + 1, progress.shards, progress.tokens, progress.version,
            )  # fmt: skip
        listener(progress)

    return listen


@contextlib.contextmanager
def logged_to(path: Path, notes: Sequence[str] = ()) -> Iterator[None]:
    """Append what is logged in the block to a file (0600), these notes first."""
    path.touch(mode=0o600)
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        for note in notes:
            logger.info(note)
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
