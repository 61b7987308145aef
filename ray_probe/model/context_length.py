"""Context length of a model, and where rotary scaling couples a batch's rows."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray_probe.errors import ConfigError, bad_value

CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")
ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True)
class Switch:
    """A length at which the longest row changes a whole batch's rotary frequencies.

    A response that crosses it would be scored with other frequencies than it was sampled with, and a row's numbers
    would depend on the rows beside it.

    Attributes:
        tokens: the longest row before the change.
        name: of the scaling.
        remedy: the change to config.json that removes the switch.
        far_side: the frequencies are the same for all rows beyond it.
    """

    tokens: int
    name: str
    remedy: str
    far_side: bool

    def problem(self, shortest_prompt: int, longest_row: int) -> str | None:
        """Describe why rows of these lengths cannot be measured; None if they can.

        Args:
            shortest_prompt: tokens of the shortest prompt.
            longest_row: tokens of the longest row, a prompt with its response.
        """
        if longest_row <= self.tokens or (self.far_side and shortest_prompt > self.tokens):
            return None
        return (
            f"prompts from {shortest_prompt} tokens and rows of up to {longest_row} lie on both sides of {self.tokens} "
            f"tokens, where {self.name} scaling changes its frequencies for a whole batch: a response's numbers would "
            f"depend on the others; keep prompt and response within {self.tokens} tokens (data.max_prompt_tokens and "
            f"data.on_long: skip leave out longer prompts), or {self.remedy}"
        )


def context_length(model_config: Any) -> int | None:
    """Return the positions that a model can see; None if it names no limit.

    Includes rotary scaling, also where the configuration has the length before scaling.
    """
    text_config = model_config.get_text_config()
    own = _own_length(text_config)
    if own is None:
        return None
    return max([own, *(_scaled(rope, own, text_config) for rope in _ropes(text_config))])


def limit_of(model_config: Any, asked: int | None) -> int | None:
    """Return the context length of a run: `data.context_length`, else the model's.

    Raises:
        ConfigError: it exceeds the limit of a model without rotary positions, whose table ends there.
    """
    own = context_length(model_config)
    if asked is None or own is None or asked <= own:
        return own if asked is None else asked
    if not any(_ropes(model_config.get_text_config())):
        remedy = f"the limit of this {model_config.model_type} model, without rotary positions, is {own}; lower it"
        raise ConfigError(bad_value("data.context_length", asked, remedy))
    return asked


def rope_switch(model_config: Any) -> Switch | None:
    """Return the first length at which a whole batch's frequencies change, or None."""
    text_config = model_config.get_text_config()
    own = _own_length(text_config)
    found = [switch for rope in _ropes(text_config) if (switch := _switch(rope, own)) is not None]
    return min(found, key=lambda switch: switch.tokens, default=None)


def setting(config: Any, name: str) -> Any:
    """Return a field of a transformers config; None if absent or different by layer."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers raises one for a field that differs by layer
        return None


def _own_length(text_config: Any) -> int | None:
    lengths = (setting(text_config, name) for name in CONTEXT_FIELDS)
    return next((value for value in lengths if isinstance(value, int) and value > 0), None)


def _ropes(text_config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rotary parameters: one set, or one for each type of layer."""
    found = setting(text_config, "rope_parameters")
    if isinstance(found, Mapping):
        nested = [value for value in found.values() if isinstance(value, Mapping)]
        yield from nested or ([found] if found else [])


def _scaled(rope: Mapping[str, Any], own: int, text_config: Any) -> int:
    """Return the positions that a scaling reaches; `own` if unknown or included."""
    kind, factor = rope.get("rope_type"), rope.get("factor")
    if not isinstance(factor, int | float):
        return own
    original = rope.get(ORIGINAL) or setting(text_config, ORIGINAL) or own
    if kind == "dynamic":
        return int(factor * own)
    # Llama 3.2 has factor 32 over 8,192 tokens and a context of 131,072: there the config's own length is the scaled
    # one. Qwen3's YaRN recipe has factor 4 over 32,768 and 40,960 in the config: there it is not. Published configs
    # with `linear` disagree, so data.context_length decides.
    if kind in ("yarn", "longrope") or (kind == "llama3" and own <= original):
        return int(factor * original)
    return own


def _switch(rope: Mapping[str, Any], own: int | None) -> Switch | None:
    kind = rope.get("rope_type")
    if kind == "dynamic" and own is not None:
        return Switch(own, "dynamic NTK", 'set a fixed rope_type such as "yarn" in config.json', far_side=False)
    pairs = [(rope.get(f"short_{name}"), rope.get(f"long_{name}")) for name in ("factor", "mscale")]
    if kind == "longrope" and any(short != long for short, long in pairs):
        original = rope.get(ORIGINAL) or own
        remedy = "give the short factors of config.json the values of the long ones (as vLLM does for a long context)"
        return None if original is None else Switch(original, "longrope", remedy, far_side=True)
    return None
