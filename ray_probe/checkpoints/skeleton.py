"""Check names, shapes and parameters of a model on `meta`, without weights.

transformers reads the checkpoint's headers as it would read the files, so its own loader reports what does not fit.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ray_probe.checkpoints.adapter.load import check_fits_model
from ray_probe.checkpoints.headers import TensorHeader
from ray_probe.checkpoints.load import load_checked
from ray_probe.checkpoints.transformers_calls import guarded
from ray_probe.errors import ConfigError
from ray_probe.model.forward import refuse_without_cache
from ray_probe.model.gradient_reach import refuse_unreached
from ray_probe.model.trainable import select_trainable


def build_skeleton(directory: Path, headers: Mapping[str, TensorHeader], config: Any, dtype: str) -> Any:
    """Build the model on `meta` from headers. Raises CheckpointError."""
    stored = {name: torch.empty(header.shape, device="meta") for name, header in headers.items()}
    config = copy.deepcopy(config)  # loading changes it
    with guarded(directory), torch.device("meta"):
        kind = type(AutoModelForCausalLM.from_config(config))
    return load_checked(directory, kind, None, dtype, "meta", config=config, state_dict=stored).eval()


def check_skeleton(skeleton: Any, adapter: Path | None, trainable: str) -> None:
    """Refuse a model, adapter or selection of parameters that cannot be measured.

    Args:
        skeleton: the model on `meta`; the adapter's modules are put into it.
        adapter: directory of the adapter, or None.
        trainable: `model.trainable`.

    Raises:
        CheckpointError: the model takes no key-value cache, or the adapter belongs to another model.
        ConfigError: `trainable` matches no parameter, or parameters that text does not reach.
    """
    refuse_without_cache(skeleton)
    if adapter is not None:
        check_fits_model(adapter, skeleton)
    chosen = select_trainable(skeleton, trainable)
    try:
        refuse_unreached(skeleton, chosen, trainable)
    except ConfigError:
        raise
    except Exception:  # some models compute from values, which `meta` has not; the loaded model is checked again
        return


def loaded_names(skeleton: Any, names: Iterable[str]) -> list[str]:
    """Return the names of tensors that become parameters."""
    ignored = list(getattr(skeleton, "_keys_to_ignore_on_load_unexpected", None) or ())
    ignored += [rf"(^|\.){re.escape('.'.join(name.split('.')[-2:]))}$" for name, _ in skeleton.named_buffers()]
    return [name for name in names if not any(re.search(pattern, name) for pattern in ignored)]
