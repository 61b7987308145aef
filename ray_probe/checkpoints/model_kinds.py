"""Refuse all but decoder-only language models, by their configuration."""

import inspect
from pathlib import Path
from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from ray_probe.checkpoints.files import unusable
from ray_probe.model.context_length import setting
from ray_probe.model.forward import CACHE

EMBEDDING_FILES = ("modules.json", "config_sentence_transformers.json")
OTHER_HEADS = {
    "ForSequenceClassification": "a classifier or reward model",
    "ForTokenClassification": "a classifier of tokens, or a process reward model",
    "ForQuestionAnswering": "a model that marks answers in a text",
    "ForMultipleChoice": "a model that chooses among answers",
    "ForMaskedLM": "a masked language model",
    "RewardModel": "a reward model",
}
"""Endings of class names in config.json's `architectures` whose heads predict no next token."""


def check_kind(directory: Path, config: Any) -> None:
    """Refuse all but decoder-only language models with a key-value cache.

    Args:
        directory: of the checkpoint.
        config: its transformers configuration.

    Raises:
        CheckpointError: names the kind, and what to give instead.
    """
    kind, name = type(config), config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise unusable(directory, f"it is an encoder-decoder model ({name})", "give a decoder-only language model")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise unusable(directory, *_other_model(config))
    for file in EMBEDDING_FILES:
        if (directory / file).is_file():
            raise unusable(
                directory,
                f"it is an embedding model ({name}, with {file} of sentence-transformers)",
                "give a language model, or remove that file if it is one",
            )
    if what := _other_head(config):
        raise unusable(directory, what, "give a checkpoint with a language model's head (...ForCausalLM)")
    if setting(config.get_text_config(), "num_attention_heads") is not None:
        return  # importing the class takes seconds, so other models are checked after loading
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    if "past_key_values" not in inspect.signature(model_class.forward).parameters:
        raise unusable(directory, f"it is a {model_class.__name__}, which keeps no keys and values", CACHE)


def _other_model(config: Any) -> tuple[str, str]:
    """Return problem and remedy of a model that is not a causal language model."""
    name = config.model_type
    parts = sorted(key.removesuffix("_config") for key in getattr(config, "sub_configs", {}))
    if "text" in parts or "thinker" in parts:
        others = " and ".join(part for part in parts if part != "text") or "other parts"
        return (
            f"it is a multimodal model ({name}: text with {others})",
            "save its language model alone (a ...ForCausalLM, with save_pretrained) and give that directory",
        )
    problem = f"it is a model of type {name}, for which transformers has no causal language model"
    return problem, "give a decoder-only one"


def _other_head(config: Any) -> str | None:
    """Describe the class in config.json if it has no language model's head."""
    for written in getattr(config, "architectures", None) or ():
        for ending, what in OTHER_HEADS.items():
            if str(written).endswith(ending):
                return f"it is a {written}, {what}"
        bare = str(written).endswith("Model") and "LMHead" not in str(written)
        if bare and not getattr(config, "tie_word_embeddings", False):
            return f"it is a {written} without a head: an embedding model, or the trunk of a language model"
    return None
