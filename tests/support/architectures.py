"""Tiny random models of every causal language model that transformers knows.

A config is made of its class's defaults with every size that it has cut down; `SPECIAL` holds what that leaves open.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

ROWS = 80
CONTEXT = 256
SIZES: dict[str, Any] = {
    "vocab_size": ROWS, "pad_token_id": 63, "bos_token_id": None, "eos_token_id": 0,
    # Widths
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "embedding_size": 32, "embedding_dim": 32,
    "word_embed_proj_dim": 32,
    "intermediate_size": 48, "n_inner": 48, "d_ff": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "head_dim": 8, "d_kv": 8, "qk_head_dim": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "kv_lora_rank": 8, "q_lora_rank": 16, "index_head_dim": 16, "lru_width": 32, "attention_hidden_size": 32,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "mamba_head_dim": 8, "mamba_d_head": 8, "mamba_d_ssm": 64,
    "ssm_state_size": 8, "state_size": 4, "mamba_d_state": 8,
    # Counts
    "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2, "encoder_layers": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "num_key_value_heads": 2, "index_n_heads": 16, "mamba_num_heads": 8,
    "mamba_n_heads": 8, "n_mamba_heads": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "n_groups": 1,
    "mamba_n_groups": 1,
    "mamba_ngroups": 1, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    # Lengths
    "max_position_embeddings": CONTEXT, "n_positions": CONTEXT, "max_seq_len": CONTEXT, "sliding_window": 6,
    "index_topk": 8, "chunk_size": 8, "mamba_chunk_size": 8, "block_size": 8, "conv_L_cache": 3,
}  # fmt: skip

_EVERY_HEAD = {"num_key_value_heads": 4}
_RECURRENT_FIRST = {"layer_types": ["linear_attention", "full_attention"]}
_WINDOW_FIRST = {"layer_types": ["sliding_attention", "full_attention"]}
_BY_LAYER = _WINDOW_FIRST | {"vocab_size_per_layer_input": ROWS, "hidden_size_per_layer_input": 8}
_BOS = {"bos_token_id": 1}
SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        ("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots3_note_text", "glm4_moe_lite",
         "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), _EVERY_HEAD,
    ),
    **dict.fromkeys(
        ("granitemoehybrid", "olmo_hybrid", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"),
        _RECURRENT_FIRST,
    ),
    **dict.fromkeys(("cwm", "emu3", "mllama", "modernbert-decoder"), _BOS),
    "bailing_hybrid": _EVERY_HEAD | _RECURRENT_FIRST,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "codegen": {"rotary_dim": 4},
    "gemma3n_text": _BY_LAYER | {
        "num_kv_shared_layers": 0, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": _BY_LAYER | {"global_head_dim": 16, "moe_intermediate_size": None},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": _EVERY_HEAD | _RECURRENT_FIRST,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8},
    "minimax": _RECURRENT_FIRST | {"sliding_window": None},
    "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    "qwen4_exp_text": _RECURRENT_FIRST | {
        "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "zamba2": {"num_hidden_layers": 2, "layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
LEFT_ALONE = {
    "falcon": ("head_dim",), "prophetnet": ("num_hidden_layers",), "xlnet": ("max_position_embeddings",),
    "xlstm": ("v_head_dim", "qk_head_dim"),
    "zamba": ("head_dim", "attention_hidden_size"), "zamba2": ("head_dim", "attention_hidden_size"),
}  # fmt: skip
NOT_TINY = {
    "blt": "models inside a model", "dbrx": "transformers 5.23 cannot build its own default",
    "dots3_note": "its text config is there", "git": "a vision tower", "moss_transcribe_diarize": "an audio tower",
    "musicgen": "models inside a model", "musicgen_melody": "models inside a model",
    "phi4_multimodal": "a vision and an audio tower", "xmod": "needs a language to be set",
}  # fmt: skip
"""What is not built here, and why. A config with a text config inside is left out too: that one is there by itself."""


def text_architectures() -> list[str]:
    """Names (`model_type`) of what is built: every architecture of text alone."""
    names = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in NOT_TINY]
    return [name for name in names if "text_config" not in getattr(CONFIG_MAPPING[name], "sub_configs", {})]


def tiny_config(name: str, **settings: Any) -> Any:
    """The config of a model of a few ten thousand parameters."""
    config_class = CONFIG_MAPPING[name]
    defaults = config_class()
    left_alone = LEFT_ALONE.get(name, ())
    sizes = {key: value for key, value in SIZES.items() if key not in left_alone and _has(defaults, key)}
    decoder = {"is_decoder": True} if _has(defaults, "is_decoder") else {}
    return config_class(**sizes | decoder | SPECIAL.get(name, {}) | settings)


def tiny(name: str, spread: float = 0.3, **settings: Any) -> Any:
    """Build a model in eval mode whose random weights show effects of positions."""
    torch.manual_seed(0)
    return loud(AutoModelForCausalLM.from_config(tiny_config(name, **settings)), spread)


def loud(model: Any, spread: float = 0.3) -> Any:
    """Weights so large that what a model does wrong shows."""
    own = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.dim() > 1:
            parameter.data.normal_(0.0, spread, generator=own)
    return model.eval()


def _has(config: Any, key: str) -> bool:
    try:
        return hasattr(config, key)
    except RuntimeError:  # it differs by layer, or the class refuses to answer
        return True
