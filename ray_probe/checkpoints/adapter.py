"""PEFT adapters: a LoRA beside a checkpoint, inspected first, then loaded by peft so that nothing of it goes missing.

The adapter's modules are put into the model itself, so what samples and is scored is the transformers model; its
parameters have the model's own names, without peft's `base_model.model.` in front, as in
`model.layers.0.self_attn.q_proj.lora_A.default.weight` (the adapter is called `default`). peft holds an adapter in
float32 beside bfloat16 weights, as in training, and in the dtype of the weights otherwise; biases and whole modules
that the adapter trains keep the dtype of the weights.
"""

import contextlib
import json
import warnings
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ray_probe.checkpoints.files import (
    ADAPTER_CONFIG,
    ADAPTER_FILES,
    ADAPTER_WEIGHTS,
    TensorHeader,
    file_headers,
    fingerprint,
    read_json,
    read_through,
    refuse,
    some,
)
from ray_probe.checkpoints.trainable import adapter_parameters, mark_adapter
from ray_probe.errors import CheckpointError, ConfigError, bad_value
from ray_probe.model.context_length import context_length
from ray_probe.model.model_call import call_model
from ray_probe.system.versions import how_to_install

FIELD = "model.adapter"
PROBE_TOKENS = 32  # enough to reach several experts of each layer
PREFIX = "base_model.model."  # what peft puts before the names of the model that it wraps
INERT_REMEDY = "train it for a step, or leave model.adapter null"
# Keys of adapter_config.json that say which plain LoRA it is, or nothing about the policy. Any other key that is set
# asks for code that draws at random, changes the weights beside it, reads other files or depends on the tokens.
_DESCRIPTIVE = (
    "auto_mapping", "base_model_name_or_path", "inference_mode", "megatron_core", "peft_version", "qalora_group_size",
    "revision",
)  # fmt: skip
_PLAIN = (
    "alpha_pattern", "ensure_weight_tying", "exclude_modules", "fan_in_fan_out", "layers_pattern",
    "layers_to_transform", "lora_alpha", "lora_bias", "lora_dropout", "modules_to_save", "peft_type", "r",
    "rank_pattern", "target_modules", "target_parameters", "trainable_token_indices", "use_dora", "use_rslora",
)  # fmt: skip
_RESTRICTED: dict[str, tuple[object, ...]] = {
    "bias": ("none", "all", "lora_only"),
    "init_lora_weights": (True, False, "gaussian"),
    "task_type": (None, "CAUSAL_LM"),
}


def inspect_adapter(path: str) -> Path:
    """Check the files of an adapter without loading its weights; returns its directory.

    Raises:
        CheckpointError: it is half-written, damaged, pickled, or no plain LoRA.
        ConfigError: the package peft is not installed.
    """
    directory = Path(path)
    if not directory.is_dir():
        remedy = "no such directory; give the directory of an adapter (relative: to the working directory)"
        raise _refuse(path, remedy)
    directory = directory.resolve()
    adapter_settings(directory)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        remedy = f"it has no {ADAPTER_WEIGHTS}; save it again with safetensors (pickle weights are not loaded)"
        raise _refuse(directory, remedy)
    if not file_headers(directory, directory / ADAPTER_WEIGHTS, FIELD):
        raise _refuse(directory, f"{ADAPTER_WEIGHTS} holds no tensor; save it again")
    _peft()
    return directory


def adapter_fingerprint(directory: Path) -> str:
    """Sha256 of the two files that an adapter is loaded from, hexadecimal."""
    return fingerprint(directory, ADAPTER_FILES)


def read_adapter(directory: Path) -> str:
    """Read an adapter's files whole; returns their fingerprint. Raises CheckpointError when a number is not finite."""
    contents = read_through(directory, ADAPTER_FILES, [directory / ADAPTER_WEIGHTS])
    _refuse_not_finite(directory, contents.not_finite)
    return contents.fingerprint


def adapter_settings(directory: Path) -> dict[str, Any]:
    """What adapter_config.json says of the policy: equal settings mean equal modules. Raises CheckpointError."""
    raw = read_json(directory, ADAPTER_CONFIG, field=FIELD)
    if "auto_map" in raw:
        raise _refuse(directory, "it asks for remote code (auto_map), and trust_remote_code is off; save it without")
    if raw.get("peft_type") != "LORA":
        raise _refuse(directory, f"its peft_type is {raw.get('peft_type')!r}; need a LORA adapter, or merge it")
    settings = {}
    for key, value in raw.items():
        if key in _DESCRIPTIVE or (key not in _PLAIN and key not in _RESTRICTED and not value):
            continue
        if key not in _PLAIN and value not in _RESTRICTED.get(key, ()):
            remedy = f"{ADAPTER_CONFIG} sets {key} to {json.dumps(value)[:60]}, and only a plain LoRA can be measured"
            raise _refuse(directory, f"{remedy}; convert it, or merge it into the weights")
        named = isinstance(value, list) and all(isinstance(item, str) for item in value)
        settings[key] = sorted(value) if named else value  # peft saves sets of names, in any order
    return settings


def check_fits_model(directory: Path, model: Any) -> None:
    """Refuse an adapter of another model, by names and shapes: peft puts it in this one, which is on `meta`."""
    headers = file_headers(directory, directory / ADAPTER_WEIGHTS, FIELD)
    with _one_line(directory), torch.device("meta"):
        wrapped = _peft().get_peft_model(model, _config(directory))
        _mark(wrapped)
        _fill(directory, wrapped, {name: _empty(header) for name, header in headers.items()})


def attach_adapter(model: Any, directory: Path, device: torch.device | str = "cpu") -> Any:
    """Load an adapter into a loaded model, eval mode; returns peft's wrapper of that same model.

    Raises CheckpointError: a key of the file is not used, a parameter is not filled or not finite, or it is inert.
    """
    ids = _probe_ids(model, directory)
    without = _logits(model, ids)  # peft's `disable_adapter` leaves trained biases in place
    with _one_line(directory):
        wrapped = _peft().PeftModel.from_pretrained(
            model, str(directory), is_trainable=True, torch_device=str(device), local_files_only=True
        )
        _mark(wrapped)
    _load(directory, wrapped, device)
    _check_moves(directory, without, _logits(model, ids))
    return wrapped


def fill_adapter(wrapped: Any, directory: Path, device: torch.device | str = "cpu") -> None:
    """Copy an adapter's tensors into modules that exist already, and check that they move the logits.

    The weights of the base model must be in place, their biases untouched by an adapter. Raises CheckpointError as
    `attach_adapter` does.
    """
    model = wrapped.get_base_model()
    ids = _probe_ids(model, directory)
    with _one_line(directory), wrapped.disable_adapter():
        without = _logits(model, ids)
    _load(directory, wrapped, device)
    _check_moves(directory, without, _logits(model, ids))


def _load(directory: Path, wrapped: Any, device: torch.device | str) -> None:
    """Read the adapter's tensors and copy them into its modules. Raises CheckpointError when one is not finite."""
    with _one_line(directory):
        tensors = load_file(directory / ADAPTER_WEIGHTS, device=str(device))
        _fill(directory, wrapped, tensors)
    _refuse_not_finite(directory, [name for name, value in tensors.items() if not torch.isfinite(value).all()])
    wrapped.eval()


def _refuse_not_finite(directory: Path, names: Collection[str]) -> None:
    if names:
        raise _refuse(directory, f"NaN or infinity in {len(names)} tensors: {some(names)}; save it again")


def _mark(wrapped: Any) -> None:
    """Note which parameters are the adapter's: those that peft made trainable, and no others, when it built them."""
    model = wrapped.get_base_model()
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    _untie(own.values())
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    mark_adapter(model, own, [name for name in names if ".original_module." in name])


def _untie(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Give parameters that are views of one memory a memory each.

    With `ensure_weight_tying` and a LoRA on the embedding, peft makes the head's LoRA a view of the embedding's, yet
    trains the two apart beside bfloat16 weights. Each then holds what the file says, and each has its gradient.
    """
    seen: set[int] = set()
    for parameter in parameters:
        address = parameter.untyped_storage().data_ptr()
        if address in seen and not parameter.is_meta:
            parameter.data = parameter.data.clone()
        seen.add(address)


def _fill(directory: Path, wrapped: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Set the adapter's tensors: peft keeps silent about a key that fits nothing and a parameter without a key."""
    expected = {PREFIX + name for name in adapter_parameters(wrapped.get_base_model())}
    try:
        result = _peft().set_peft_model_state_dict(wrapped, tensors)
    except KeyError as error:
        raise _refuse(directory, f"{ADAPTER_WEIGHTS} has no {error.args[0]}; save the whole adapter") from error
    unused, empty = sorted(result.unexpected_keys), sorted(expected.intersection(result.missing_keys))
    if unused or empty:
        kind, names = ("tensors fit nothing in the model", unused) if unused else ("parameters are not in it", empty)
        remedy = f"{len(names)} {kind}: {some(name.removeprefix(PREFIX) for name in names)}"
        raise _refuse(directory, f"{remedy}; give the adapter of this very checkpoint, saved whole")


def _probe_ids(model: Any, directory: Path) -> torch.Tensor:
    """Tokens [1, L] to try an adapter with: those that it trains by themselves first, then any, far apart."""
    trained = adapter_settings(directory).get("trainable_token_indices") or []
    lists = trained.values() if isinstance(trained, dict) else [trained]
    rows = model.get_input_embeddings().weight.shape[0]
    ids = [token for tokens in lists for token in tokens if token < rows][: PROBE_TOKENS // 2]
    ids += [place * 7919 % rows for place in range(PROBE_TOKENS - len(ids))]
    return torch.tensor([ids[: context_length(model.config)]], device=model.device)


@torch.no_grad()
def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = call_model(model, input_ids=ids, use_cache=False).logits
    return logits


def _check_moves(directory: Path, without: torch.Tensor, with_it: torch.Tensor) -> None:
    """Refuse an adapter that changes no logit: its run would measure the model without it, unnoticed."""
    if torch.equal(with_it, without):
        remedy = f"it is inert: it moves no logit in {with_it.dtype} (is lora_B all zero, and the adapter untrained?)"
        raise _refuse(directory, f"{remedy}; {INERT_REMEDY}")


def _empty(header: TensorHeader) -> torch.Tensor:
    return torch.empty(header.shape, device="meta")


def _config(directory: Path) -> Any:
    config = _peft().PeftConfig.from_pretrained(str(directory), local_files_only=True)
    config.inference_mode = False
    return config


def _peft() -> Any:
    """The package, imported where an adapter is asked for and nowhere else."""
    try:
        import peft
    except ImportError as error:
        remedy = f"it needs the package peft, which is not here ({error}); {how_to_install('peft')}"
        raise ConfigError(bad_value(FIELD, "an adapter", remedy)) from error
    return peft


def _refuse(directory: Path | str, remedy: str) -> CheckpointError:
    return refuse(directory, remedy, FIELD)


@contextlib.contextmanager
def _one_line(directory: Path) -> Iterator[None]:
    """Errors of peft become one line, and its warnings nothing: what they are about is checked."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except (CheckpointError, ConfigError):
        raise
    except Exception as error:  # peft raises whatever its parts raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        told = next((line for line in lines if "size mismatch" in line), lines[0]).replace(PREFIX, "")
        remedy = f"it cannot be loaded ({told[:200]}); give the adapter of this very checkpoint, saved whole"
        raise _refuse(directory, remedy) from error
