"""Choose the ids that end a response: those of the first source that names any.

A union of sources would end responses at an ordinary token: LlamaConfig, for example, names id 2 by default.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ray_probe.errors import CheckpointError, ConfigError, bad_value
from ray_probe.system.json_object import JsonObject

KEY = "generation.eos_token_ids"

TokenText = Callable[[int], str]


class EosSource(NamedTuple):
    """One source of EOS ids.

    Attributes:
        name: of the source, for messages.
        value: its `eos_token_id` as written; None or an empty list names no id.
        single: the source can name only one id, so it agrees with every choice that contains this id.
    """

    name: str
    value: object
    single: bool = False


@dataclass(frozen=True)
class Eos(JsonObject):
    """The token ids that end a response."""

    ids: tuple[int, ...]
    """Ascending; empty where only the cap ends a response."""
    source: str
    """The file or configuration key that decided."""
    others: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Sources that name other ids, with those ids."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Text of each token above, by id."""

    def line(self) -> str:
        """Return ids, texts and source, as `0 '<eos>' (config.json)`."""
        return f"{self._shown(self.ids)} ({self.source})"

    def differences(self) -> str:
        """Return the sources that disagree, grouped by ids, as `config.json names 2 'b'`."""
        names: dict[tuple[int, ...], list[str]] = {}
        for name, ids in self.others.items():
            names.setdefault(ids, []).append(name)
        return "; ".join(
            f"{', '.join(group)} name{'s' if len(group) == 1 else ''} {self._shown(ids)}"
            for ids, group in names.items()
        )

    def _shown(self, ids: Sequence[int]) -> str:
        texts = ((token, self.texts.get(str(token))) for token in ids)
        return ", ".join(str(token) if text is None else f"{token} {text!r}" for token, text in texts) or "no token"


def resolve_eos(
    explicit: Sequence[int] | None, sources: Sequence[EosSource], rows: int | None, text: TokenText
) -> Eos:
    """Choose the ids that end a response.

    Args:
        explicit: `generation.eos_token_ids`, which precedes every source.
        sources: by precedence.
        rows: embedding rows of the model, or None if unknown.
        text: returns the text of a token.

    Raises:
        ConfigError: an explicit id has no embedding row.
        CheckpointError: no source names an id, or one names an invalid id.
    """
    if explicit is not None:
        taken = EosSource(KEY, list(explicit))
        if rows is not None and any(token >= rows for token in explicit):
            raise ConfigError(bad_value(KEY, list(explicit), f"need ids below the {rows} tokens of the model"))
    else:
        named = [source for source in sources if _ids(source)]
        if not named:
            raise CheckpointError(
                f"{KEY}: got null, and the checkpoint names no EOS token; "
                "list the ids that end a response, or [] to end at the cap alone"
            )
        taken = named[0]
    ids = _ids(taken)
    if rows is not None and any(token >= rows for token in ids):
        remedy = f"{taken.name} names ids past the {rows} embedding rows; correct it, or set {KEY}"
        raise CheckpointError(bad_value("eos_token_id", taken.value, remedy))
    others = {source.name: _ids(source) for source in sources if _differs(source, ids, explicit is not None)}
    mentioned = sorted({*ids, *itertools.chain(*others.values())})
    return Eos(ids, taken.name, others, {str(token): text(token) for token in mentioned})


def token_text(tokenizer: Any) -> TokenText:
    """Return a function from a token id to its text, special tokens included."""
    return lambda token: str(tokenizer.decode([token], skip_special_tokens=False))


def _ids(source: EosSource) -> tuple[int, ...]:
    """Return the ids of a source, ascending. Raises CheckpointError for invalid ones."""
    value: Any = source.value
    listed = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in listed):
        raise CheckpointError(bad_value("eos_token_id", value, f"need integers >= 0 in {source.name}, or set {KEY}"))
    return tuple(sorted(set(listed)))


def _differs(source: EosSource, taken: tuple[int, ...], explicit: bool) -> bool:
    try:
        ids = _ids(source)
    except CheckpointError:
        if explicit:  # the config key replaces an invalid source
            return False
        raise
    return bool(ids) and not (set(ids) <= set(taken) if source.single else ids == taken)
