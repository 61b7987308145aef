"""The log of a measurement: `log.txt` in the run directory."""

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from ray_probe.checkpoints.tokenizer.eos import KEY as EOS_KEY
from ray_probe.config.schema import ProbeConfig
from ray_probe.errors import some
from ray_probe.run.backend import LoadingBackend
from ray_probe.run.preparation.forward_passes import Pass
from ray_probe.run.preparation.prepared import PreparedRun
from ray_probe.run.progress import Listener, Progress

logger = logging.getLogger("ray_probe")


def log_start(config: ProbeConfig, backend: LoadingBackend, finished: int, passes: Pass) -> None:
    """Logs the settings of a measurement that begins or resumes."""
    estimator, baseline = config.estimator, config.estimator.baseline
    logger.info(
        "x_estimator_mode=%s baseline.mode=%s baseline.fit=%s features=%s ridge_lambda=%g",
        estimator.x_estimator_mode, baseline.mode, baseline.fit, _features(config), baseline.ridge_lambda,
    )  # fmt: skip
    logger.info(
        "actors=%d device=%s parameters=%d first round=%d of %s",
        backend.actors, backend.info.device, backend.layout.size, finished + 1, config.batch.rounds,
    )  # fmt: skip
    logger.info("pass=%s (%s)", passes.name, passes.why)
    if frozen := backend.info.frozen:
        logger.info(
            "model.trainable=%s leaves out %d parameters that the architecture has frozen: %s",
            config.model.trainable, len(frozen), some(frozen),
        )  # fmt: skip
    if backend.info.why_no_head:
        logger.info("teacher forcing holds the logits of a micro-batch: %s", backend.info.why_no_head)
    if backend.info.in_turns:
        logger.warning("both models do not fit on the device: it holds one at a time, and loads each once a shard")
    if not backend.info.takes_padding:
        logger.info("padding changes what this model says: prompts of one length are sampled at once, and no others")
    if baseline.mode != "none" and baseline.fit == "in_sample":
        logger.warning("estimator.baseline.fit=in_sample biases the gradient by O(1/N); leave_one_out does not")


def baseline_line(config: ProbeConfig) -> str:
    """Returns the baseline of a run, and what it reads, for people."""
    baseline = config.estimator.baseline
    if baseline.mode != "regression":
        return f"baseline {baseline.mode}"
    return f"baseline regression ({baseline.fit}) on {', '.join(config.columns)}"


def _features(config: ProbeConfig) -> str:
    """Returns the configured features, and what the name of a set stands for."""
    features, columns = config.estimator.baseline.features, ",".join(config.columns)
    return f"{features} ({columns})" if isinstance(features, str) else columns


def log_text(prepared: PreparedRun) -> None:
    """Logs the origin of tokenizer and chat template, and the EOS tokens."""
    checkpoint, eos, after_eos = prepared.checkpoint, prepared.eos, prepared.prompts.ending_with_eos
    if checkpoint.adapter is not None:
        template = checkpoint.template_from or "neither"
        logger.info("tokenizer from %s, chat template from %s", checkpoint.tokenizer_from, template)
    logger.info("responses end at %s", eos.line())
    if differences := eos.differences():
        logger.warning("%s; not used, %s decides", differences, EOS_KEY)
    if after_eos:
        logger.warning("%d prompts end with an EOS token: their responses begin after the end of a text", after_eos)


def tell(listener: Listener, text: str) -> None:
    """Reports an event outside rounds, to the log and the listener."""
    logger.info(text)
    listener(Progress.outside(text))


@contextlib.contextmanager
def warnings_to(listener: Listener) -> Iterator[None]:
    """Reports logged warnings to the listener, for the block."""
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: listener(Progress.outside(record.getMessage()))  # type: ignore[method-assign]
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


def log_to(listener: Listener) -> Listener:
    """Returns a listener that also logs notes and the end of each round."""

    def listen(progress: Progress) -> None:
        if progress.note is not None:
            logger.warning(progress.note)
        elif progress.accumulated == progress.shards > 0:
            logger.info(
                "round %d: %s of %d shards are in, %d tokens so far, beta version %d",
                progress.round + 1, progress.summed, progress.shards, progress.tokens, progress.version,
            )  # fmt: skip
        listener(progress)

    return listen


@contextlib.contextmanager
def logged_to(path: Path, notes: Sequence[str] = ()) -> Iterator[None]:
    """Appends the log of the block to a file (0600), after these notes."""
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
