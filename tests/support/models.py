"""Tiny real transformers checkpoints, made on the spot."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ray_probe.config.loading import config_from_dict
from ray_probe.config.schema import GenerationSettings, ProbeConfig
from ray_probe.sequence_processor import SequenceProcessor

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

EOS = 0


def character_tokenizer(characters: str, pad: bool = True) -> transformers.PreTrainedTokenizerFast:
    """Build a tokenizer of one token a character; id 0 is EOS, the last id may pad."""
    words = ["<eos>", *characters, *(["<pad>"] if pad else [])]
    model = models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>" if pad else None
    )


def tiny_gpt2(vocabulary: int, dtype: torch.dtype = torch.float64, seed: int = 0, positions: int = 32) -> Any:
    """Build a model whose entropies vary, with LayerNorm, which computes in float64."""
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=8, n_layer=1, n_head=2, initializer_range=0.6,
        eos_token_id=EOS, bos_token_id=None, attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    own = torch.Generator().manual_seed(seed)  # weights that no version of transformers changes
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.6, generator=own)
    return model.to(dtype)


def tiny_llama(vocabulary: int, seed: int = 0, positions: int = 64, spread: float = 0.5, **settings: Any) -> Any:
    """A Llama of a few thousand parameters, float32."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=positions, initializer_range=spread, eos_token_id=EOS, bos_token_id=None, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


_SHARED = {"initializer_range": 0.5, "eos_token_id": EOS, "bos_token_id": None}
_TWO_LAYERS = _SHARED | {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": None,
    "max_position_embeddings": 64,
}  # fmt: skip
_GROUPED = _TWO_LAYERS | {"num_key_value_heads": 1}
_SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _GROUPED),
    "llama_tied": ("Llama", _GROUPED | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", _SHARED | {"n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}),
    "opt": ("OPT", {
        "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 64, "init_std": 0.5, "eos_token_id": EOS, "bos_token_id": None, "pad_token_id": 1,
    }),
    "gemma2": ("Gemma2", _GROUPED | {
        "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 4, "final_logit_softcapping": 5.0,
        "attn_logit_softcapping": 5.0,
    }),
    "mistral": ("Mistral", _GROUPED | {"sliding_window": 4}),
    "gpt_neox": ("GPTNeoX", _TWO_LAYERS),
    "bloom": ("Bloom", _SHARED | {"hidden_size": 16, "n_layer": 2, "n_head": 2, "pad_token_id": None}),
    "qwen2": ("Qwen2", _GROUPED),
}  # fmt: skip
ARCHITECTURES = tuple(_SETTINGS)


def tiny_model(architecture: str, vocabulary: int, seed: int = 0) -> Any:
    """A model of `ARCHITECTURES` with random float32 weights.

    Among them are learned, offset, rotary and no positions, tied heads, soft-capped logits, and attention windows of
    4 tokens (Gemma 2 and Mistral).
    """
    family, settings = _SETTINGS[architecture]
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(vocab_size=vocabulary, **settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def tiny_experts(family: str, vocabulary: int, seed: int = 0, **settings: Any) -> Any:
    """Build two layers of four experts, two a token; `family` as in `MixtralConfig`."""
    torch.manual_seed(seed)
    shared = _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    config = getattr(transformers, f"{family}Config")(vocab_size=vocabulary, **shared | settings)
    return transformers.AutoModelForCausalLM.from_config(config)


def tiny_vision() -> Any:
    """A Gemma 3 of 8 tokens that reads images too."""
    torch.manual_seed(0)
    text = _GROUPED | {
        "vocab_size": 8, "head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": ["full_attention"] * 2,
    }  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": 8, "patch_size": 4}  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=7, boi_token_index=6,
        eoi_token_index=6,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def save_checkpoint(directory: Path, model: Any, characters: str) -> Path:
    """A checkpoint directory of the model with the character tokenizer that fits it."""
    model.save_pretrained(directory)
    pad = model.config.get_text_config().vocab_size > len(characters) + 1
    character_tokenizer(characters, pad=pad).save_pretrained(directory)
    return directory


def probe_config(checkpoint: Path, **sections: dict[str, Any]) -> ProbeConfig:
    """Return a config on the checkpoint; sections as in YAML, with the prompts."""
    model = {"path": str(checkpoint)} | sections.pop("model", {})
    return config_from_dict({"model": model, **sections})


def processor(model: Any, characters: str, features: Any = None, **generation: Any) -> SequenceProcessor:
    """A processor on a tiny model with the character tokenizer that fits it."""
    pad = model.config.vocab_size > len(characters) + 1
    tokenizer = character_tokenizer(characters, pad)
    extra = {} if features is None else {"features": features}
    return SequenceProcessor(model, tokenizer, GenerationSettings(**generation), **extra)
