"""Read the EOS ids that a checkpoint's files, or a model in memory, name."""

from pathlib import Path
from typing import Any

from ray_probe.checkpoints.files import read_json
from ray_probe.checkpoints.tokenizer.eos import EosSource

GENERATION, CONFIG, TOKENIZER = "generation_config.json", "config.json", "tokenizer"
_TEXT_SECTIONS = ("decoder", "generator", "text_config")  # transformers reads the text model's settings there
_NOTHING = (EosSource(GENERATION, None), EosSource(CONFIG, None))


def written_sources(directory: Path) -> tuple[EosSource, EosSource]:
    """Read the ids in generation_config.json and config.json, without class defaults.

    Raises:
        CheckpointError: one of the files is not a JSON object.
    """
    raw = read_json(directory, CONFIG)
    sections = (raw, *(raw[name] for name in _TEXT_SECTIONS if isinstance(raw.get(name), dict)))
    written = (section.get("eos_token_id") for section in sections)
    in_config = next((value for value in written if value is not None), None)
    in_generation = read_json(directory, GENERATION, required=False).get("eos_token_id")
    return EosSource(GENERATION, in_generation), EosSource(CONFIG, in_config)


def sources_of_model(model: Any, tokenizer: Any) -> tuple[EosSource, ...]:
    """Return the sources of a model in memory that the caller loaded.

    Omits a `generation_config` that transformers filled from the config, and a class default in the config, unless
    the files of the model's directory contain them.
    """
    config, generation = model.config, getattr(model, "generation_config", None)
    origin = Path(str(config.name_or_path)) if getattr(config, "name_or_path", None) else None
    on_disk = written_sources(origin) if origin is not None and (origin / CONFIG).is_file() else _NOTHING
    owner = next((one for one in (config, config.get_text_config()) if _eos_of(one) is not None), config)
    in_config, in_generation = _eos_of(owner), _eos_of(generation)
    if on_disk[0].value is None and getattr(generation, "_from_model_config", False) and in_generation == in_config:
        in_generation = None
    if on_disk[1].value is None and in_config == _eos_of(type(owner)):
        in_config = None
    return (
        EosSource(GENERATION, in_generation),
        EosSource(CONFIG, in_config),
        EosSource(TOKENIZER, tokenizer.eos_token_id, single=True),
    )


def _eos_of(config: Any) -> Any:
    return getattr(config, "eos_token_id", None)
