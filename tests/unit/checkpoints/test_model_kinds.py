"""Checkpoints of other kinds of models are refused before a weight is loaded."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from support.architectures import ROWS, SIZES, tiny, tiny_config
from support.models import character_tokenizer, tiny_llama

from ray_probe.checkpoints.inspection import Checkpoint, inspect_checkpoint
from ray_probe.checkpoints.model_kinds import check_kind
from ray_probe.config.schema import ModelConfig
from ray_probe.errors import CheckpointError

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
TEXT = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                                       "num_attention_heads", "num_key_value_heads", "pad_token_id")}  # fmt: skip


def qwen2_vl() -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4, "in_channels": 3}
    ids = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 59}
    config = transformers.Qwen2VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision, **ids)
    return transformers.Qwen2VLForConditionalGeneration(config)


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=ROWS, **sizes))


def llama(head: str, **settings: Any) -> Any:
    return getattr(transformers, f"Llama{head}")(tiny_llama(ROWS, **settings).config)


MODELS = {
    "T5": (t5, "it is an encoder-decoder model (t5); give a decoder-only language model"),
    "Qwen2-VL": (qwen2_vl, "it is a multimodal model (qwen2_vl: text with vision); save its language model alone"),
    "ViT": (lambda: transformers.ViTModel(transformers.ViTConfig(hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=16)), "it is a model of type vit, for which transformers has no"),
    "reward model": (lambda: llama("ForSequenceClassification"),
                     "it is a LlamaForSequenceClassification, a classifier or reward model; give a checkpoint with"),
    "trunk": (lambda: llama("Model"), "it is a LlamaModel without a head: an embedding model, or the trunk of a"),
    "masked": (lambda: transformers.BertForMaskedLM(tiny_config("bert")), "it is a BertForMaskedLM, a masked language"),
    "Mamba": (lambda: tiny("mamba"), "it is a MambaForCausalLM, which keeps no keys and values; need a decoder-only"),
}  # fmt: skip


def inspected(directory: Path, model: Any) -> Checkpoint:
    model.save_pretrained(directory)
    character_tokenizer(CHARACTERS).save_pretrained(directory)
    return inspect_checkpoint(ModelConfig(path=str(directory)))


@pytest.mark.parametrize("name", MODELS)
def test_another_kind_of_model_is_refused_as_what_it_is(tmp_path: Path, name: str):
    make, says = MODELS[name]
    with pytest.raises(CheckpointError) as caught:
        inspected(tmp_path, make())
    message = str(caught.value)
    assert message.startswith(f"model.path: got '{tmp_path}'"[:30]) and says in message
    assert "\n" not in message and "version of transformers" not in message


@pytest.mark.parametrize("file", ["modules.json", "config_sentence_transformers.json"])
def test_an_embedding_model_is_known_by_the_files_of_sentence_transformers(tmp_path: Path, file: str):
    (tmp_path / file).write_text("[]")
    with pytest.raises(CheckpointError, match=rf"it is an embedding model \(llama, with {file} of sentence-transf"):
        inspected(tmp_path, tiny_llama(ROWS))


def test_language_models_pass_under_every_name_that_their_class_had(tmp_path: Path):
    for model in (tiny_llama(ROWS), llama("Model", tie_word_embeddings=True)):
        assert inspected(tmp_path, model).config.model_type == "llama"
    for name in ("LLaMAForCausalLM", "GPT2LMHeadModel", "ReformerModelWithLMHead", "OwnForCausalLM", None):
        config = tiny_config("gpt2")
        config.architectures = None if name is None else [name]
        check_kind(tmp_path, config)


def test_text_configs_inside_of_multimodal_ones_that_transformers_can_load_pass(tmp_path: Path):
    for config_class in (transformers.Gemma3Config, transformers.Llama4Config):
        check_kind(tmp_path, config_class())
