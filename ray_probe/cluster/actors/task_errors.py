"""Whether a task's error concerns its shard, its device or the whole run."""

from typing import TypeGuard

from ray_probe.errors import NonFiniteError, ProbeError, ShardError

OF_THE_SHARD = (NonFiniteError, ShardError)
"""ProbeErrors that concern a task's shard alone; any other concerns the run."""


def concerns_the_run(error: Exception) -> TypeGuard[ProbeError]:
    """Whether every shard would meet this error: a full disk, a dead fitter."""
    return isinstance(error, ProbeError) and not isinstance(error, OF_THE_SHARD)


def is_of_memory(error: Exception) -> bool:
    """Whether the device or the node ran out of memory."""
    text = str(error)
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or "out of memory" in text or "can't allocate memory" in text


def breaks_the_device(error: Exception) -> bool:
    """Whether every later task of the process would fail too."""
    # After such an error CUDA refuses all work.
    return type(error).__name__ == "AcceleratorError" or str(error).startswith("CUDA error")
