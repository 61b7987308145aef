"""Load the tokenizer and chat template of a policy.

Trainers write the tokenizer that they used into an adapter's directory. It precedes the base model's.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ray_probe.checkpoints.files import read_json, unusable
from ray_probe.checkpoints.tokenizer.eos import EosSource
from ray_probe.checkpoints.tokenizer.eos_sources import GENERATION, TOKENIZER, written_sources
from ray_probe.checkpoints.transformers_calls import OFFLINE, guarded

Field = Literal["model.path", "model.adapter"]

TOKENIZER_JSON, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_VOCABULARIES = (TOKENIZER_JSON, "tokenizer.model", "vocab.json")
# Classes that use tokenizer.json as written. For some model types AutoTokenizer replaces them by a class that builds
# another normalizer and pre-tokenizer and adds special tokens, so prompts would get other ids than in training.
_VERBATIM = ("TokenizersBackend", "PreTrainedTokenizerFast")


@dataclass(frozen=True)
class PolicyTokenizer:
    """The tokenizer of a policy, and the directories that its parts come from.

    Attributes:
        tokenizer: with the chat template of the policy, if there is one.
        directory: of the tokenizer.
        tokenizer_from: config key of this directory.
        template_from: config key of the chat template's directory; None without a template.
        eos_sources: the sources of EOS ids, first the one that decides.
    """

    tokenizer: Any
    directory: Path
    tokenizer_from: Field
    template_from: Field | None
    eos_sources: tuple[EosSource, ...]


def open_tokenizer(directory: Path, adapter: Path | None, config: Any) -> PolicyTokenizer:
    """Load the tokenizer of a policy, the adapter's or else the checkpoint's.

    Args:
        directory: of the checkpoint.
        adapter: directory of the adapter on it, or None.
        config: transformers configuration of the checkpoint.

    Raises:
        CheckpointError: neither has a tokenizer, or one cannot be loaded.
    """
    own = None if adapter is None else _of_adapter(adapter, config)
    base = load_tokenizer(directory) if own is None or _has_tokenizer(directory) else None
    sources: tuple[EosSource, ...] = written_sources(directory)
    if base is not None:
        sources = (*sources, EosSource(TOKENIZER, base.eos_token_id, single=True))
    template_from: Field | None = "model.path" if getattr(base, "chat_template", None) else None
    if adapter is not None:
        sources, template_from = _with_adapter(adapter, own, base, sources), _choose_template(own, base, adapter)
        if own is not None:
            return PolicyTokenizer(own, adapter, "model.adapter", template_from, sources)
    return PolicyTokenizer(base, directory, "model.path", template_from, sources)


def load_tokenizer(directory: Path, field: Field = "model.path", config: Any = None) -> Any:
    """Load the tokenizer of a directory with the class that the directory names.

    Args:
        directory: of a checkpoint or an adapter.
        field: config key of the directory, for messages.
        config: transformers configuration of the model, where the directory has none.

    Raises:
        CheckpointError: the directory has no tokenizer, or transformers cannot load it.
    """
    if not _has_tokenizer(directory):
        raise unusable(directory, "it has no tokenizer", "put tokenizer.json beside the weights", field)
    declared = read_json(directory, TOKENIZER_CONFIG, required=False, field=field).get("tokenizer_class")
    verbatim = declared in _VERBATIM and (directory / TOKENIZER_JSON).is_file()
    chosen: dict[str, Any] = {} if config is None or verbatim else {"config": config}
    load = PreTrainedTokenizerFast if verbatim else AutoTokenizer
    with guarded(directory, field, "its tokenizer"):
        return load.from_pretrained(directory, **OFFLINE, **chosen)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _VOCABULARIES)


def _of_adapter(adapter: Path, config: Any) -> Any | None:
    """Load the adapter's tokenizer; None if its directory has no part of one."""
    settings = read_json(adapter, TOKENIZER_CONFIG, required=False, field="model.adapter")
    if "auto_map" in settings:
        raise unusable(
            adapter,
            f"its {TOKENIZER_CONFIG} asks for remote code (auto_map), which is off",
            "save it without",
            "model.adapter",
        )
    if _has_tokenizer(adapter):
        return load_tokenizer(adapter, "model.adapter", config)
    if settings:
        raise unusable(
            adapter,
            f"it has {TOKENIZER_CONFIG} and no tokenizer",
            f"copy {TOKENIZER_JSON} too, or remove the file",
            "model.adapter",
        )
    return None


def _choose_template(own: Any | None, base: Any | None, adapter: Path) -> Field | None:
    """Set the chat template of the tokenizer in use; returns its source's config key."""
    if own is not None and own.chat_template:
        return "model.adapter"
    tokenizer: Any = base if own is None else own
    if (adapter / CHAT_TEMPLATE).is_file():
        try:
            tokenizer.chat_template = (adapter / CHAT_TEMPLATE).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise unusable(
                adapter, f"{CHAT_TEMPLATE} cannot be read ({error})", "copy it again", "model.adapter"
            ) from error
        return "model.adapter"
    tokenizer.chat_template = getattr(base, "chat_template", None)
    return "model.path" if tokenizer.chat_template else None


def _with_adapter(
    adapter: Path, own: Any | None, base: Any | None, sources: tuple[EosSource, ...]
) -> tuple[EosSource, ...]:
    """Put the adapter's EOS sources before its base's.

    Most adapters hold an unchanged copy of the base's tokenizer. Such a copy does not replace the ids of the base's
    generation_config.json, which may be several.
    """
    raw = read_json(adapter, GENERATION, required=False, field="model.adapter")
    first = EosSource(f"adapter's {GENERATION}", raw.get("eos_token_id"))
    if own is None:
        return (first, *sources)
    tokenizer = EosSource(f"adapter's {TOKENIZER}", own.eos_token_id, single=True)
    if base is not None and own.eos_token_id == base.eos_token_id:
        return (first, *sources[:-1], tokenizer)
    return (first, tokenizer, *sources)
