"""The class for verl's `trainer.checkpoint_callback_class` (its v1 trainer)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from ray_probe.integrations.spool import SPOOL, has_weights, request, warned_only

_MODELS = ("actor/huggingface", "actor/model/huggingface")
"""Where FSDP (with `hf_model` in `save_contents`) and Megatron put weights that transformers loads."""


class ProbeCheckpointCallback:
    """Requests the measurement of every checkpoint that verl saves.

    A subclass may set `spool` and `tags`. verl aborts training on an exception of its callback: none leaves this one.
    """

    spool: ClassVar[Path | str | None] = None
    """Directory of requests; None: `.ray_probe` in `trainer.default_local_dir`."""
    tags: ClassVar[Mapping[str, str]] = {}
    """Labels that results show beside the step."""

    def __init__(self, config: Any = None) -> None:
        """Take verl's configuration, which is not needed."""

    def on_save(
        self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **kwargs: Any
    ) -> None:
        """Hand over the model in a checkpoint, or the checkpoint where it has none yet."""
        with warned_only():
            directory = Path(checkpoint_dir)
            # With async_save the workers may still write. `watch` then waits for verl's own mark, beside the directory.
            written = () if async_save else _MODELS
            model = next((place for name in written if has_weights(place := directory / name)), directory)
            spool = self.spool or directory.parent / SPOOL
            request(spool, model, global_step, "verl", self.tags, source=directory, pin=not async_save)
