"""Loading a checkpoint so that what runs is what the directory says, and refusing it otherwise.

safetensors only, an explicit dtype, no remote code, and no tensor missing, unexpected or of another shape: transformers
would give a missing layer random weights and go on.
"""

import copy
import os
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from ray_probe.checkpoints.adapter import adapter_fingerprint, inspect_adapter, read_adapter
from ray_probe.checkpoints.adapter_changes import refuse_untrained
from ray_probe.checkpoints.eos import EosIds, resolve_eos, token_text
from ray_probe.checkpoints.files import (
    ADAPTER_CONFIG,
    CHECKPOINT_FILES,
    WEIGHTS,
    TensorHeader,
    fingerprint,
    read_json,
    read_through,
    refuse,
    some,
    weight_headers,
)
from ray_probe.checkpoints.model_kinds import check_kind
from ray_probe.checkpoints.skeleton import check_skeleton, loaded_ones
from ray_probe.checkpoints.tokenizer import PolicyTokenizer, check_token_ids, open_tokenizer
from ray_probe.checkpoints.trainable import NO_ADAPTER, mark_frozen
from ray_probe.config.schema import ModelConfig
from ray_probe.errors import ClusterError, ConfigError, bad_value

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
# What config.json may set these to (with or without a leading underscore): all else is a kernel whose code transformers
# may fetch from the hub, or a file other than the one that is checked here.
_ALLOWED: dict[str, tuple[object, ...]] = {
    "attn_implementation": (None, "eager", "sdpa"),
    "experts_implementation": (None, "eager", "batched_mm", "grouped_mm"),
    "transformers_weights": (None, WEIGHTS),
}

# The grouped product that transformers takes for a mixture of experts is not there in float64.
_EXPERTS: dict[str, dict[str, str]] = {"float64": {"experts_implementation": "eager"}}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint directory that passed the checks which need no weights in memory.

    Attributes:
        directory: where it lies.
        fingerprint: sha256 of its weights, configuration and tokenizer files, hexadecimal; empty when not asked for.
        config: the transformers configuration.
        policy_tokenizer: the tokenizer of the policy, the adapter's where it has one.
        rows: of its embeddings: token ids are below.
        adapter: where the adapter on it lies, or None.
        adapter_fingerprint: sha256 of the adapter's weights, configuration and tokenizer files, hexadecimal; empty
            without one.
    """

    directory: Path
    fingerprint: str
    config: Any
    policy_tokenizer: PolicyTokenizer
    rows: int
    adapter: Path | None = None
    adapter_fingerprint: str = ""

    @property
    def tokenizer(self) -> Any:
        """The tokenizer of the policy."""
        return self.policy_tokenizer.tokenizer

    def eos(self, explicit: Sequence[int] | None) -> EosIds:
        """Choose the ids that end a response; `explicit` is `generation.eos_token_ids`. Raises an InputError."""
        return resolve_eos(explicit, self.policy_tokenizer.eos_sources, self.rows, token_text(self.tokenizer))


def inspect_checkpoint(settings: ModelConfig, hashed: bool = True) -> Checkpoint:
    """Check a checkpoint, and the adapter on it, without loading weights.

    Args:
        settings: names them.
        hashed: read every byte too, for the fingerprints and to see that weights are finite.

    Raises:
        CheckpointError: one line about the first thing that is wrong.
        ConfigError: `model.trainable` asks for what is not there or what no text reaches, or peft is not installed.
    """
    if settings.trainable == "adapter" and settings.adapter is None:
        raise ConfigError(bad_value("model.trainable", settings.trainable, NO_ADAPTER))
    directory = _directory(settings)
    _check_settings(directory)
    headers = weight_headers(directory)
    with _quiet():
        config = _guarded(directory, AutoConfig.from_pretrained, directory)
        check_kind(directory, config)
    adapter = None if settings.adapter is None else inspect_adapter(settings.adapter)
    with _quiet():
        tokenizer = open_tokenizer(directory, adapter, config)
    skeleton = _skeleton(directory, headers, config, settings.dtype)
    rows = skeleton.get_input_embeddings().weight.shape[0]
    check_token_ids(tokenizer, rows)
    check_skeleton(skeleton, adapter, settings.trainable)
    if adapter is not None:
        refuse_untrained(adapter, headers)
    found = Checkpoint(directory, "", config, tokenizer, rows, adapter)
    return _read(found, {header.file for header in headers.values()}, skeleton) if hashed else found


def _read(found: Checkpoint, weights: Collection[Path], skeleton: Any) -> Checkpoint:
    """Read every byte: the fingerprints, and whether each weight is finite."""
    contents = read_through(found.directory, CHECKPOINT_FILES, weights)
    _refuse_not_finite(found.directory, loaded_ones(skeleton, contents.not_finite))
    of_adapter = "" if found.adapter is None else read_adapter(found.adapter)
    return replace(found, fingerprint=contents.fingerprint, adapter_fingerprint=of_adapter)


def load_model(directory: Path, dtype: str, device: torch.device | str = "cpu") -> Any:
    """Load the weights, eval mode, on the device. Raises CheckpointError naming what does not fit."""
    model = _loaded(directory, AutoModelForCausalLM.from_pretrained, directory, dtype, device, use_safetensors=True)
    _refuse_not_finite(directory, [name for name, value in model.named_parameters() if not torch.isfinite(value).all()])
    _own_memory(model)
    return model.eval()


def _skeleton(directory: Path, headers: Mapping[str, TensorHeader], config: Any, dtype: str) -> Any:
    """The model on `meta`: transformers goes through the headers as it does through files, and opens none."""
    stored = {name: torch.empty(header.shape, device="meta") for name, header in headers.items()}
    config = copy.deepcopy(config)  # loading writes into it
    with _quiet(), torch.device("meta"):
        kind = type(_guarded(directory, AutoModelForCausalLM.from_config, config))
    return _loaded(directory, kind.from_pretrained, None, dtype, "meta", config=config, state_dict=stored).eval()


def _loaded(
    directory: Path, load: Any, source: Path | None, dtype: str, device: torch.device | str, **options: Any
) -> Any:
    """What a loader of transformers makes of a checkpoint. Raises CheckpointError naming what does not fit."""
    with _quiet():
        model, info = _guarded(
            directory,
            load,
            source,
            dtype=DTYPES[dtype],
            device_map={"": torch.device(device)},  # tensor by tensor to the device, never a whole model on the way
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported with its name below, not refused without one
            **_EXPERTS.get(dtype, {}),
            **options,
        )
    for kind in ("missing", "unexpected", "mismatched"):
        names = sorted(str(entry[0] if isinstance(entry, tuple) else entry) for entry in info[f"{kind}_keys"])
        if names:
            raise refuse(directory, f"{len(names)} tensors are {kind}: {some(names)}; export the checkpoint again")
    mark_frozen(model, _frozen_by_architecture(model))
    return model


def _refuse_not_finite(directory: Path, names: Collection[str]) -> None:
    if names:
        remedy = f"NaN or infinity in {len(names)} tensors: {some(names)}; export the checkpoint again"
        raise refuse(directory, remedy)


def _frozen_by_architecture(model: Any) -> list[str]:
    """Names of the parameters that a new model of this class has frozen: loading has them all require a gradient."""
    with torch.device("meta"):
        fresh = type(model)(model.config)
    return [name for name, parameter in fresh.named_parameters() if not parameter.requires_grad]


def _own_memory(model: Any) -> None:
    """Copy what still lies in the mapped file, tensor by tensor: who wrote to the file would change the policy."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def check_fingerprint(directory: Path, expected: str, adapter: Path | None = None, adapter_expected: str = "") -> None:
    """Refuse files that are not the ones that the run measures: overwritten since, or another node's copy."""
    found = [("model.path", directory, fingerprint(directory), expected)]
    if adapter is not None:
        found.append(("model.adapter", adapter, adapter_fingerprint(adapter), adapter_expected))
    for field, place, there, wanted in found:
        if there != wanted:
            remedy = f"its files on node {platform.node()} have the fingerprint {there[:12]}, the run measures"
            raise refuse(place, f"{remedy} {wanted[:12]}; keep a checkpoint as it is while it is measured", field)


def _directory(settings: ModelConfig) -> Path:
    if os.path.isdir(settings.path):
        return Path(settings.path).resolve()
    if settings.local_files_only:
        remedy = "no such directory; give the directory of a checkpoint (relative: to the working directory)"
        raise refuse(settings.path, remedy)
    from huggingface_hub import snapshot_download

    found = _guarded(
        settings.path, snapshot_download, settings.path, revision=settings.revision, allow_patterns=CHECKPOINT_FILES
    )
    return Path(found)


def _guarded(directory: Path | str, load: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a loader of transformers offline and without remote code; its errors become one line."""
    if load.__name__ == "from_pretrained":
        kwargs |= {"local_files_only": True, "trust_remote_code": False}
    try:
        return load(*args, **kwargs)
    except torch.OutOfMemoryError as error:
        told = str(error).split(". ")[0]
        remedy = f"its weights do not fit on the device ({told}); use a larger one"
        raise ClusterError(bad_value("model.path", str(directory), remedy)) from error
    except Exception as error:  # loaders raise whatever their parsers raise
        text = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "check its files, and that this version of transformers knows the model"
        raise refuse(directory, f"it cannot be loaded ({text[0][:200]}); {remedy}") from error


def _check_settings(directory: Path) -> None:
    """Refuse JSON files that transformers would not read, or would follow to something else."""
    if (directory / ADAPTER_CONFIG).is_file():
        remedy = f"it holds an adapter ({ADAPTER_CONFIG}); name it in model.adapter and its base model in model.path"
        raise refuse(directory, remedy)
    raw = read_json(directory, "config.json")
    if "auto_map" in raw or "auto_map" in read_json(directory, "tokenizer_config.json", required=False):
        raise refuse(directory, "it asks for remote code (auto_map), and trust_remote_code is off; convert it first")
    sections = [section for section in (raw, *raw.values()) if isinstance(section, dict)]
    for key, value in (item for section in sections for item in section.items()):
        if value not in _ALLOWED.get(key.removeprefix("_"), (value,)):
            raise refuse(directory, f"config.json sets {key}, which can bring in other code or weights; remove it")
    if raw.get("quantization_config"):
        raise refuse(directory, "its weights are quantised (quantization_config); export it in float32 or bfloat16")
    read_json(directory, "generation_config.json", required=False)  # its EOS ids would be dropped without a word


class _quiet:
    """No progress bars and load reports of transformers: what matters is raised."""

    def __enter__(self) -> None:
        self._verbosity = transformers_logging.get_verbosity()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()

    def __exit__(self, *error: Iterable[object]) -> None:
        transformers_logging.set_verbosity(self._verbosity)
