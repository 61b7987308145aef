"""Load the weights of a checkpoint, and refuse those that do not fit.

Only safetensors, an explicit dtype and no remote code. A tensor that is missing, unexpected or of another shape is an
error, because transformers would give a missing layer random weights.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from ray_probe.checkpoints.files import refuse_not_finite, unusable
from ray_probe.checkpoints.transformers_calls import LOADING, OFFLINE, guarded
from ray_probe.errors import some
from ray_probe.model.trainable import mark_frozen

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# The grouped product that transformers uses for a mixture of experts does not exist in float64.
_EXPERTS: dict[str, dict[str, str]] = {"float64": {"experts_implementation": "eager"}}


def load_model(directory: Path, dtype: str, device: torch.device | str = "cpu") -> Any:
    """Load the weights onto the device, eval mode. Raises CheckpointError."""
    model = load_checked(directory, AutoModelForCausalLM, directory, dtype, device, use_safetensors=True)
    refuse_not_finite(directory, [name for name, value in model.named_parameters() if not torch.isfinite(value).all()])
    _copy_mapped(model)
    return model.eval()


def load_checked(
    directory: Path, kind: Any, source: Path | None, dtype: str, device: torch.device | str, **options: Any
) -> Any:
    """Call `kind.from_pretrained` and check that every tensor was loaded.

    Args:
        directory: of the checkpoint, for messages.
        kind: class of transformers.
        source: directory to load from; None with a `state_dict` among the options.
        dtype: of the weights.
        device: of the weights.
        options: further arguments of `from_pretrained`.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    with guarded(directory):
        model, info = kind.from_pretrained(
            source,
            dtype=DTYPES[dtype],
            device_map={"": torch.device(device)},  # tensor by tensor, never a whole model on the way
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by name below
            **OFFLINE,
            **_EXPERTS.get(dtype, {}),
            **options,
        )
    for problem in ("missing", "unexpected", "mismatched"):
        keys = (entry[0] if isinstance(entry, tuple) else entry for entry in info[f"{problem}_keys"])
        if names := sorted(map(str, keys)):
            raise unusable(
                directory, f"{len(names)} tensors are {problem}: {some(names)}", "export the checkpoint again"
            )
    mark_frozen(model, _frozen_by_architecture(model))
    return model


def _frozen_by_architecture(model: Any) -> list[str]:
    # Loading makes all parameters require a gradient, so a new model of the class is asked.
    with LOADING, torch.device("meta"):
        fresh = type(model)(model.config)
    return [name for name, parameter in fresh.named_parameters() if not parameter.requires_grad]


def _copy_mapped(model: Any) -> None:
    # Tensors on the CPU lie in the mapped file, and writing to the file would change the policy.
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
