"""The tokenizer and chat template of a policy, and what its files say about the end of a response.

Trainers write the tokenizer that they used into an adapter's directory. It comes before that of the base model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ray_probe.checkpoints.eos import EosSource
from ray_probe.checkpoints.eos_sources import GENERATION, TOKENIZER, written_sources
from ray_probe.checkpoints.files import read_json, refuse, some

Field = Literal["model.path", "model.adapter"]

TOKENIZER_JSON, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
_VOCABULARIES = (TOKENIZER_JSON, "tokenizer.model", "vocab.json")
# Classes that take tokenizer.json as it stands. AutoTokenizer replaces them for some model types by a class that builds
# another normalizer and pre-tokenizer and adds special tokens of its own: a prompt then has other ids than in training.
_VERBATIM = ("TokenizersBackend", "PreTrainedTokenizerFast")


@dataclass(frozen=True)
class PolicyTokenizer:
    """A tokenizer, and which of checkpoint and adapter its parts come from.

    Attributes:
        tokenizer: with the chat template of the policy, where there is one.
        directory: that the tokenizer was loaded from.
        tokenizer_from: config key that names this directory.
        template_from: config key of the directory that holds the chat template; None without one.
        eos_sources: what the files say about the end of a response, in the order in which they are taken.
    """

    tokenizer: Any
    directory: Path
    tokenizer_from: Field
    template_from: Field | None
    eos_sources: tuple[EosSource, ...]


def open_tokenizer(directory: Path, adapter: Path | None, config: Any) -> PolicyTokenizer:
    """Load the tokenizer of a policy: the adapter's where it has one, else the checkpoint's.

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
    if adapter is None:
        template_from: Field | None = "model.path" if getattr(base, "chat_template", None) else None
        return PolicyTokenizer(base, directory, "model.path", template_from, sources)
    sources, template_from = _with_adapter(adapter, own, base, sources), _choose_template(own, base, adapter)
    if own is None:
        return PolicyTokenizer(base, directory, "model.path", template_from, sources)
    return PolicyTokenizer(own, adapter, "model.adapter", template_from, sources)


def load_tokenizer(directory: Path, field: Field = "model.path", config: Any = None) -> Any:
    """Load the tokenizer of a directory, by the class that its tokenizer_config.json names.

    Args:
        directory: of a checkpoint or an adapter.
        field: config key that named the directory, for messages.
        config: transformers configuration of the model, where the directory has none.

    Raises:
        CheckpointError: the directory has no tokenizer, or transformers cannot load it.
    """
    if not _has_tokenizer(directory):
        raise refuse(directory, "it has no tokenizer; put tokenizer.json beside the weights", field)
    declared = read_json(directory, TOKENIZER_CONFIG, required=False, field=field).get("tokenizer_class")
    verbatim = declared in _VERBATIM and (directory / TOKENIZER_JSON).is_file()
    chosen: dict[str, Any] = {} if config is None or verbatim else {"config": config}
    load = PreTrainedTokenizerFast if verbatim else AutoTokenizer
    try:
        return load.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **chosen)
    except Exception as error:  # loaders raise whatever their parsers raise
        text = str(error).strip().splitlines() or [type(error).__name__]
        remedy = "check its files, and that this version of transformers knows the model"
        raise refuse(directory, f"its tokenizer cannot be loaded ({text[0][:200]}); {remedy}", field) from error


def check_token_ids(found: PolicyTokenizer, rows: int) -> None:
    """Refuse a tokenizer that can name tokens without an embedding row.

    Args:
        found: the tokenizer of the policy.
        rows: embedding rows of the model.

    Raises:
        CheckpointError: names the tokens, and says where transformers and no file added them.
    """
    tokenizer, directory, field = found.tokenizer, found.directory, found.tokenizer_from
    past = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if not past:
        return
    problem = f"its tokenizer has ids up to {past[-1][0]}, the embeddings have {rows} rows"
    added = _not_in_files(directory, [token for _, token in past], field)
    if added:
        added_by = f"no file of it holds {some(map(repr, added))}: transformers adds it to a {type(tokenizer).__name__}"
        remedy = f"set tokenizer_class to PreTrainedTokenizerFast in {TOKENIZER_CONFIG}, or resize the embeddings"
        raise refuse(directory, f"{problem}; {added_by}; {remedy}", field)
    named = some(f"{number} {token[:40]!r}" for number, token in past)
    remedy = "resize them, or put in the tokenizer that the model was trained with"
    raise refuse(directory, f"{problem} ({named}); {remedy}", field)


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / name).is_file() for name in _VOCABULARIES)


def _of_adapter(adapter: Path, config: Any) -> Any | None:
    """The adapter's tokenizer, or None where its directory holds no part of one."""
    settings = read_json(adapter, TOKENIZER_CONFIG, required=False, field="model.adapter")
    if "auto_map" in settings:
        remedy = f"its {TOKENIZER_CONFIG} asks for remote code (auto_map), which is off; save it without"
        raise refuse(adapter, remedy, "model.adapter")
    if _has_tokenizer(adapter):
        return load_tokenizer(adapter, "model.adapter", config)
    if settings:
        remedy = f"it has {TOKENIZER_CONFIG} and no tokenizer; copy {TOKENIZER_JSON} too, or remove the file"
        raise refuse(adapter, remedy, "model.adapter")
    return None


def _choose_template(own: Any | None, base: Any | None, adapter: Path) -> Field | None:
    """Give the tokenizer in use the chat template of the policy, and say whose it is."""
    if own is not None and own.chat_template:
        return "model.adapter"
    tokenizer: Any = base if own is None else own
    if (adapter / CHAT_TEMPLATE).is_file():
        try:
            tokenizer.chat_template = (adapter / CHAT_TEMPLATE).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            remedy = f"{CHAT_TEMPLATE} cannot be read ({error}); copy it again"
            raise refuse(adapter, remedy, "model.adapter") from error
        return "model.adapter"
    tokenizer.chat_template = getattr(base, "chat_template", None)
    return "model.path" if tokenizer.chat_template else None


def _with_adapter(
    adapter: Path, own: Any | None, base: Any | None, sources: tuple[EosSource, ...]
) -> tuple[EosSource, ...]:
    """Put what the adapter says about the end of a response before what its base says.

    Most adapters hold an unchanged copy of the base's tokenizer. Such a copy says nothing new, so it does not replace
    the ids of the base's generation_config.json, which may be several.
    """
    raw = read_json(adapter, GENERATION, required=False, field="model.adapter")
    first = EosSource(f"adapter's {GENERATION}", raw.get("eos_token_id"))
    if own is None:
        return (first, *sources)
    tokenizer = EosSource(f"adapter's {TOKENIZER}", own.eos_token_id, single=True)
    if base is not None and own.eos_token_id == base.eos_token_id:
        return (first, *sources[:-1], tokenizer)
    return (first, tokenizer, *sources)


def _not_in_files(directory: Path, tokens: list[str], field: Field) -> list[str]:
    """Those of the tokens that no file of the directory names; none where there is no tokenizer.json to look into."""
    if not (directory / TOKENIZER_JSON).is_file():
        return []
    found: set[str] = set(Tokenizer.from_file(str(directory / TOKENIZER_JSON)).get_vocab())
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"):
        raw = read_json(directory, name, required=False, field=field)
        for value in (*raw, *raw.values(), *raw.get("added_tokens_decoder", {}).values()):
            listed = value if isinstance(value, list) else [value]
            found |= {str(token.get("content") if isinstance(token, dict) else token) for token in listed}
    return [token for token in tokens if token not in found]
