"""What a task's error concerns: its shard, its device, or the whole run."""

from typing import TypeGuard

from ray_probe.errors import NonFiniteError, ProbeError, ShardError

OF_THE_SHARD = (NonFiniteError, ShardError)
"""Our own errors of a task that say something of its shard alone; any other ProbeError concerns the run."""


def concerns_the_run(error: Exception) -> TypeGuard[ProbeError]:
    """Whether a task's error would come for every shard: a full disk, another checkpoint, a fitter that is gone."""
    return isinstance(error, ProbeError) and not isinstance(error, OF_THE_SHARD)


def is_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of the device or of the node."""
    text = str(error)
    named = type(error).__name__ in ("OutOfMemoryError", "MemoryError")
    return named or "out of memory" in text or "can't allocate memory" in text


def breaks_the_device(error: Exception) -> bool:
    """Whether every later task of the process would fail too: after such an error CUDA refuses all work."""
    return type(error).__name__ == "AcceleratorError" or str(error).startswith("CUDA error")
