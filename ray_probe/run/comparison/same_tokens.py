"""The checkpoint A of a comparison: inspected, and of the same tokens as B."""

import json
from datetime import datetime

from ray_probe.checkpoints.inspection import Checkpoint, inspect_checkpoint
from ray_probe.checkpoints.swap import Architecture
from ray_probe.config.schema import ModelConfig, ProbeConfig
from ray_probe.data.chat_template import ChatTemplate
from ray_probe.data.prompts import PromptSet, load_prompts
from ray_probe.data.tokenization import encode_prompts
from ray_probe.errors import ConfigError, InputError, bad_value, some

FIELDS = {"model.path": "compare.against", "model.adapter": "compare.adapter"}
CHECKED = 1_000
"""Prompts encoded at once."""


def model_of_against(config: ProbeConfig) -> ModelConfig:
    """Return the config section of A: as `model`, with its own directories."""
    own = {"path": config.compare.against, "adapter": config.compare.adapter, "revision": None, "trainable": "all"}
    return config.model.model_copy(update=own)


def inspect_against(config: ProbeConfig, hashed: bool = True) -> Checkpoint | None:
    """Inspect A; None where the run is no comparison.

    Args:
        config: of the run.
        hashed: as in `inspect_checkpoint`.

    Raises:
        InputError: as `inspect_checkpoint`, with the keys of A in the place of those of `model`.
    """
    if config.compare.against is None:
        return None
    try:
        return inspect_checkpoint(model_of_against(config), hashed)
    except InputError as error:
        text = str(error)
        for key, own in FIELDS.items():
            text = text.replace(key, own)
        raise type(error)(text) from None


def check_same_tokens(config: ProbeConfig, a: Checkpoint, b: Checkpoint, prompts: PromptSet, created: datetime) -> None:
    """Refuse checkpoints of different tokens, ends of responses or prompts.

    Args:
        config: of the run.
        a: the checkpoint of `compare.against`.
        b: the checkpoint of `model`.
        prompts: as B's chat template renders them.
        created: date for chat templates that write one.

    Raises:
        ConfigError: the first difference, one line.
    """
    mine, theirs = b.tokenizer.get_vocab(), a.tokenizer.get_vocab()
    if mine != theirs:
        differ = sorted(token for token in mine.keys() | theirs.keys() if mine.get(token) != theirs.get(token))
        first = f"{differ[0]!r} is {theirs.get(differ[0], 'absent')} there and {mine.get(differ[0], 'absent')} here"
        raise _refused(config, f"{len(differ)} tokens have another id than in model.path ({first})")
    if a.rows != b.rows:
        raise _refused(config, f"it has {a.rows} rows of embeddings, model.path {b.rows}")
    explicit = config.generation.eos_token_ids
    if set(a.eos(explicit).ids) != set(b.eos(explicit).ids):
        ends = f"its responses end at {list(a.eos(explicit).ids)}, those of model.path at {list(b.eos(explicit).ids)}"
        raise ConfigError(bad_value("compare.against", config.compare.against, f"{ends}; set generation.eos_token_ids"))
    chat = config.data.chat_template
    texts = prompts.texts
    if chat:
        render = ChatTemplate(a.tokenizer, created)
        source, local = config.data.prompts, config.model.local_files_only
        texts = load_prompts(source, config.data.field, render, local, config.data.id_field).texts
    for start in range(0, len(texts), CHECKED):
        part = slice(start, start + CHECKED)
        ours, others = (encode_prompts(one.tokenizer, of[part], chat) for one, of in ((b, prompts.texts), (a, texts)))
        if ours != others:
            place = next(index for index, (one, other) in enumerate(zip(ours, others, strict=True)) if one != other)
            where = prompts.where(start + place)
            raise _refused(config, f"its chat template or tokenizer makes another prompt of {where}")


def check_same_architecture(config: ProbeConfig, a: Checkpoint, b: Checkpoint) -> None:
    """Refuse checkpoints that have no midpoint, where `compare.parts` asks for one.

    Args:
        config: of the run.
        a: the checkpoint of `compare.against`.
        b: the checkpoint of `model`.

    Raises:
        ConfigError: their config.json differ, one line.
    """
    if not config.compare.parts:
        return
    here, there = (
        json.loads(Architecture.of(one.directory, None, config.model.dtype, "cpu").config) for one in (b, a)
    )
    differ = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    if differ:
        what = f"config.json of compare.against and of model.path differ in {some(differ)}"
        remedy = "parts need checkpoints of one architecture; compare such checkpoints, or set it to false"
        raise ConfigError(bad_value("compare.parts", True, f"{what}; {remedy}"))


def _refused(config: ProbeConfig, why: str) -> ConfigError:
    remedy = "a comparison needs the same token ids and the same rendered prompts; compare checkpoints of one model"
    return ConfigError(bad_value("compare.against", config.compare.against, f"{why}; {remedy}"))
