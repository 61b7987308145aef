"""One run from request to result: files checked, cluster reached, rounds worked off, results written."""

import contextlib
import logging
import logging.handlers
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_probe.cluster.backend import RayBackend
from ray_probe.cluster.connection import ClusterInfo, Demand, connected
from ray_probe.config import ProbeConfig, dump_yaml, load_config
from ray_probe.errors import ConfigError, ProbeError, bad_value
from ray_probe.offline_entropy_probe import OfflineEntropyProbe
from ray_probe.preflight import Prepared, changed_since, check_same_inputs, manifest, prepare
from ray_probe.progress import Listener, Progress
from ray_probe.report.plots import write_plots
from ray_probe.run_directory import RunDirectory, default_name

logger = logging.getLogger("ray_probe")
FREE_SECTIONS = ("cluster", "output")


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
    """A run as far as it got.

    Attributes:
        directory: where its files are, once it has one.
        result: the object of result.json, once it is written.
        finished_rounds: whole rounds that are committed.
    """

    directory: RunDirectory | None = None
    result: dict[str, Any] | None = None
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
    return load_config(directory.config, request.overrides), directory


def execute(request: Request, listener: Listener, run: Run) -> dict[str, Any]:
    """Do what was asked; returns the result, which is on disk then, with its plots.

    Args:
        request: what to do.
        listener: told of progress.
        run: filled in as the run gets on, so that the caller knows what there is when it is interrupted.
    """
    config, run.directory = resolve(request)
    tell = _teller(listener)
    prepared = prepare(config)
    if run.directory is None:
        RunDirectory.check_free(Path(prepared.config.output.dir), str(config.output.name))
    else:
        run.directory.lock()
        earlier = run.directory.read_json("manifest.json")
        check_same_inputs(prepared, earlier)
        for change in changed_since(earlier, config.cluster.cpus_per_actor):
            tell(f"since the run was started, {change}: the last bits of what follows may differ")
    with _log_held_back() as open_log:
        cluster = prepared.config.cluster
        demand = Demand(
            cluster.actors, cluster.cpus_per_actor, cluster.gpus_per_actor, cluster.resources, cluster.slots
        )
        if cluster.address is None:
            tell("starting Ray on this machine")
        with connected(
            cluster.address, cluster.namespace, demand, runtime_env=dict(cluster.runtime_env), log=tell
        ) as info:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put a handler of its own there
            backend = RayBackend(
                prepared.config,
                prepared.checkpoint.directory,
                prepared.policy_id,
                prepared.checkpoint.fingerprint,
                tell,
            )
            try:
                tell(f"loading the checkpoint on {cluster.actors} rollout actors")
                backend.start()
                probe = _open(prepared, run, backend, info, open_log, listener)
                run.result = _finish(probe, run)
            finally:
                backend.close()
    assert run.directory is not None
    write_plots(run.result, run.directory.finished_rounds(), run.directory.path)
    return run.result


def _finish(probe: OfflineEntropyProbe, run: Run) -> dict[str, Any]:
    """Run to the end; on Ctrl-C or an error write what the finished rounds give before passing it on."""
    try:
        return probe.run()
    except (KeyboardInterrupt, ProbeError):
        if probe.finished_rounds:
            with contextlib.suppress(ProbeError):  # a full disk, say: the first error is the one to tell
                run.result = probe.finish()
        raise
    finally:
        run.finished_rounds = probe.finished_rounds
        logger.info("%d rounds are finished", probe.finished_rounds)


def _open(
    prepared: Prepared,
    run: Run,
    backend: RayBackend,
    info: ClusterInfo,
    open_log: Callable[[Path], None],
    listener: Listener,
) -> OfflineEntropyProbe:
    """Make or reopen the run directory, start the fitter beside it, and set the probe up."""
    config = prepared.config
    if run.directory is None:
        assert config.output.name is not None
        run.directory = RunDirectory.create(Path(config.output.dir), config.output.name)
        run.directory.lock()
        run.directory.config.write_text(dump_yaml(config), encoding="utf-8")
        run.directory.write_json("manifest.json", manifest(prepared, backend.info, asdict(info)))
    directory = run.directory
    open_log(directory.path / "log.txt")
    finished = [_counted(line) for line in directory.finished_rounds()]
    _log_start(config, backend, len(finished))
    backend.open(directory.ledger, finished)
    return OfflineEntropyProbe(config, prepared.plan, backend, directory, _logged(listener))


def _counted(line: dict[str, Any]) -> list[int]:
    """Shards of a finished round whose record the fit holds."""
    return list(line["records"])


def _log_start(config: ProbeConfig, backend: RayBackend, finished: int) -> None:
    estimator, baseline = config.estimator, config.estimator.baseline
    logger.info(
        "x_estimator_mode=%s baseline.mode=%s baseline.fit=%s features=%s ridge_lambda=%g",
        estimator.x_estimator_mode, baseline.mode, baseline.fit, ",".join(baseline.features), baseline.ridge_lambda,
    )  # fmt: skip
    logger.info(
        "actors=%d device=%s parameters=%d eos_token_ids=%s first round=%d of %d",
        config.cluster.actors, backend.info["device"], backend.layout.size, list(backend.info["eos_ids"]), finished,
        config.batch.rounds,
    )  # fmt: skip
    if baseline.mode != "none" and baseline.fit == "in_sample":
        logger.warning("estimator.baseline.fit=in_sample biases the gradient by O(1/N); leave_one_out does not")


def _teller(listener: Listener) -> Callable[[str], None]:
    """Tells of what happens outside rounds: to the log, and as progress."""

    def tell(text: str) -> None:
        logger.info(text)
        listener(Progress(0, 0, 0, 0, 0, 0, 0.0, 0, 0, 0, None, text))

    return tell


def _logged(listener: Listener) -> Listener:
    """Write notes, and the end of each round, into the log too."""

    def listen(progress: Progress) -> None:
        if progress.note is not None:
            logger.warning(progress.note)
        elif progress.accumulated == progress.shards > 0:
            logger.info(
                "round %d: gradients of %d shards are in, %d tokens so far, beta version %d",
                progress.round, progress.shards, progress.tokens, progress.version,
            )  # fmt: skip
        listener(progress)

    return listen


@contextlib.contextmanager
def _log_held_back() -> Iterator[Callable[[Path], None]]:
    """Hold log lines back until the run directory exists, then write them to its log.txt."""
    held = logging.handlers.MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(held)
    files: list[logging.Handler] = []

    def open_log(path: Path) -> None:
        file = logging.FileHandler(path, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        files.append(file)
        held.setTarget(file)
        held.flush()
        logger.removeHandler(held)
        logger.addHandler(file)

    try:
        yield open_log
    finally:
        for handler in (held, *files):
            logger.removeHandler(handler)
            handler.close()


def overrides(settings: Sequence[str], actors: str | None, address: str | None, out: Path | None) -> tuple[str, ...]:
    """The settings of a command line: `--set` first, then the options that stand for a key."""
    named = {"cluster.actors": actors, "cluster.address": address, "output.dir": out}
    return (*settings, *(f"{key}={value}" for key, value in named.items() if value is not None))
