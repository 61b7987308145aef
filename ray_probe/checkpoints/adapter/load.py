"""Load a PEFT adapter into a model, and check that all of it arrives.

The adapter's modules go into the transformers model itself, which still samples and scores. Their parameters have the
model's own names, such as `model.layers.0.self_attn.q_proj.lora_A.default.weight` (the adapter is called `default`),
without peft's prefix. Beside bfloat16 weights peft holds an adapter in float32, as in training, and in the dtype of
the weights otherwise. Biases and whole modules that the adapter trains keep the dtype of the weights.
"""

import contextlib
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ray_probe.checkpoints.adapter.files import (
    FIELD,
    INERT_REMEDY,
    PREFIX,
    adapter_settings,
    import_peft,
)
from ray_probe.checkpoints.files import ADAPTER_WEIGHTS, refuse_not_finite, unusable
from ray_probe.checkpoints.headers import file_headers
from ray_probe.errors import ProbeError, some
from ray_probe.model.context_length import context_length
from ray_probe.model.model_call import call_model
from ray_probe.model.trainable import adapter_parameters, mark_adapter

SAVE_WHOLE = "give the adapter of this very checkpoint, saved whole"
PROBE_TOKENS = 32  # enough to reach several experts of each layer


def check_fits_model(directory: Path, model: Any) -> None:
    """Put the adapter's modules into a model on `meta`. Raises CheckpointError."""
    headers = file_headers(directory, directory / ADAPTER_WEIGHTS, FIELD)
    with _peft_errors(directory), torch.device("meta"):
        config = import_peft().PeftConfig.from_pretrained(str(directory), local_files_only=True)
        config.inference_mode = False
        wrapped = import_peft().get_peft_model(model, config)
        _mark(wrapped)
        _fill(directory, wrapped, {name: torch.empty(header.shape) for name, header in headers.items()})


def attach_adapter(model: Any, directory: Path, device: torch.device | str = "cpu") -> Any:
    """Load an adapter into a loaded model; returns peft's wrapper of it, eval mode.

    Raises:
        CheckpointError: a tensor fits nothing, a parameter is missing or not finite, or the adapter is inert.
    """
    ids_1L = _probe_ids(model, directory)
    without = _logits(model, ids_1L)  # peft's `disable_adapter` would leave trained biases in place
    with _peft_errors(directory):
        wrapped = import_peft().PeftModel.from_pretrained(
            model, str(directory), is_trainable=True, torch_device=str(device), local_files_only=True
        )
        _mark(wrapped)
    _load(directory, wrapped, device, ids_1L, without)
    return wrapped


def fill_adapter(wrapped: Any, directory: Path, device: torch.device | str = "cpu") -> None:
    """Copy an adapter's tensors into existing modules.

    The weights of the base model must be in place, with biases that no adapter changed.

    Raises:
        CheckpointError: as `attach_adapter`.
    """
    ids_1L = _probe_ids(wrapped.get_base_model(), directory)
    with _peft_errors(directory), wrapped.disable_adapter():
        without = _logits(wrapped.get_base_model(), ids_1L)
    _load(directory, wrapped, device, ids_1L, without)


def _load(
    directory: Path, wrapped: Any, device: torch.device | str, ids_1L: torch.Tensor, without: torch.Tensor
) -> None:
    """Copy the adapter's tensors into its modules, and refuse an inert one.

    Args:
        directory: of the adapter.
        wrapped: peft's wrapper of the model.
        device: of the model.
        ids_1L: tokens to try.
        without: logits of these tokens without the adapter.
    """
    with _peft_errors(directory):
        tensors = load_file(directory / ADAPTER_WEIGHTS, device=str(device))
        _fill(directory, wrapped, tensors)
    not_finite = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
    refuse_not_finite(directory, not_finite, FIELD)
    wrapped.eval()
    # An inert adapter's run would measure the base model unnoticed.
    if torch.equal(_logits(wrapped.get_base_model(), ids_1L), without):
        raise unusable(
            directory,
            f"it is inert: it moves no logit in {without.dtype} (is lora_B all zero, and the adapter untrained?)",
            INERT_REMEDY,
            FIELD,
        )


def _mark(wrapped: Any) -> None:
    """Mark the adapter's parameters: those that peft has just made trainable."""
    model = wrapped.get_base_model()
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _untie(own.values())
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    mark_adapter(model, own, [name for name in names if ".original_module." in name])


def _untie(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give parameters that are views of one memory a memory each.

    With `ensure_weight_tying` and a LoRA on the embedding, peft makes the head's LoRA a view of the embedding's, but
    trains the two apart beside bfloat16 weights. Untied, each holds its tensor of the file and has its gradient.
    """
    seen: set[int] = set()
    for parameter in parameters:
        address = parameter.untyped_storage().data_ptr()
        if address in seen and not parameter.is_meta:
            parameter.data = parameter.data.clone()
        seen.add(address)


def _fill(directory: Path, wrapped: Any, tensors: dict[str, torch.Tensor]) -> None:
    # peft ignores a tensor that fits nothing and a parameter without a tensor.
    expected = {PREFIX + name for name in adapter_parameters(wrapped.get_base_model())}
    try:
        result = import_peft().set_peft_model_state_dict(wrapped, tensors)
    except KeyError as error:
        raise unusable(
            directory, f"{ADAPTER_WEIGHTS} has no {error.args[0]}", "save the whole adapter", FIELD
        ) from error
    for kind, names in (
        ("tensors fit nothing in the model", sorted(result.unexpected_keys)),
        ("parameters are not in it", sorted(expected.intersection(result.missing_keys))),
    ):
        if names:
            listed = some(name.removeprefix(PREFIX) for name in names)
            raise unusable(directory, f"{len(names)} {kind}: {listed}", SAVE_WHOLE, FIELD)


def _probe_ids(model: Any, directory: Path) -> torch.Tensor:
    """Return tokens [1, L] to try an adapter with, first those that it trains."""
    trained = adapter_settings(directory).get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    rows = model.get_input_embeddings().weight.shape[0]
    ids = [token for tokens in lists for token in tokens if token < rows][: PROBE_TOKENS // 2]
    ids += [place * 7919 % rows for place in range(PROBE_TOKENS - len(ids))]
    return torch.tensor([ids[: context_length(model.config)]], device=model.device)


@torch.no_grad()
def _logits(model: Any, ids_1L: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = call_model(model, input_ids=ids_1L, use_cache=False).logits
    return logits


@contextlib.contextmanager
def _peft_errors(directory: Path) -> Iterator[None]:
    """Turn errors of peft into one line, and ignore its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except ProbeError:
        raise
    except Exception as error:  # peft raises any type
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        line = next((line for line in lines if "size mismatch" in line), lines[0]).replace(PREFIX, "")
        raise unusable(directory, f"it cannot be loaded ({line[:200]})", SAVE_WHOLE, FIELD) from error
