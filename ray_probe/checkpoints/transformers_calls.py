"""Call transformers' loaders offline, quietly and with errors of one line."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from ray_probe.checkpoints.files import unusable
from ray_probe.errors import ClusterError, ProbeError, bad_value, first_line

OFFLINE = {"local_files_only": True, "trust_remote_code": False}
"""Arguments of every `from_pretrained`."""

# While transformers loads, it replaces functions of its own and of torch for the whole process. Two threads at once
# restore them in the wrong order, and every later model would keep random weights or untied ones.
LOADING = threading.RLock()


@contextmanager
def guarded(directory: Path | str, field: str = "model.path", subject: str = "it") -> Iterator[None]:
    """Silence transformers during the block and turn its errors into one line.

    One thread at a time is inside.

    Args:
        directory: that is loaded.
        field: config key that names it.
        subject: of the message, for example `its tokenizer`.

    Raises:
        CheckpointError: it cannot be loaded.
        ClusterError: its weights do not fit on the device.
    """
    with LOADING:
        verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            with _one_line(directory, field, subject):
                yield
        finally:
            transformers_logging.set_verbosity(verbosity)


@contextmanager
def _one_line(directory: Path | str, field: str, subject: str) -> Iterator[None]:
    try:
        yield
    except ProbeError:
        raise
    except torch.OutOfMemoryError as error:
        remedy = f"its weights do not fit on the device ({str(error).split('. ')[0]}); use a larger one"
        raise ClusterError(bad_value(field, str(directory), remedy)) from error
    except Exception as error:  # parsers raise any type
        raise unusable(
            directory,
            f"{subject} cannot be loaded ({first_line(error)})",
            "check its files, and that this version of transformers knows the model",
            field,
        ) from error
