"""What can be known of a policy from a model without weights, which takes no memory and a fraction of a second.

transformers builds it on the device `meta` and goes through the checkpoint's headers as it goes through its files, so
names and shapes that do not fit are found by the loader itself.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ray_probe.checkpoints.adapter import check_fits_model
from ray_probe.checkpoints.gradient_reach import refuse_unreached
from ray_probe.checkpoints.trainable import select_trainable
from ray_probe.errors import ConfigError
from ray_probe.model.forward import refuse_without_cache


def check_skeleton(skeleton: Any, adapter: Path | None, trainable: str) -> None:
    """Refuse what a policy with these names, shapes and parameters could not measure.

    Args:
        skeleton: the model on `meta`; the adapter's modules are put into it.
        adapter: directory of the adapter, or None.
        trainable: `model.trainable`.

    Raises:
        CheckpointError: the model takes no key-value cache, or the adapter is another model's.
        ConfigError: `trainable` chooses nothing, or what no text reaches.
    """
    refuse_without_cache(skeleton)
    if adapter is not None:
        check_fits_model(adapter, skeleton)
    chosen = select_trainable(skeleton, trainable)
    try:
        refuse_unreached(skeleton, chosen, trainable)
    except ConfigError:
        raise
    except Exception:  # some models look at numbers to compute, which are not there: loading tries again with them
        return


def loaded_ones(skeleton: Any, names: Iterable[str]) -> list[str]:
    """Those tensors of a checkpoint that become parameters: not buffers, nor what transformers passes over."""
    passed_over = list(getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ())
    passed_over += [rf"(^|\.){re.escape('.'.join(name.split('.')[-2:]))}$" for name, _ in skeleton.named_buffers()]
    return [name for name in names if not any(re.search(pattern, name) for pattern in passed_over)]
