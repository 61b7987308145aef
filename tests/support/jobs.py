"""Tokenizers with a chat template and BOS, and configs of small jobs with them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors

from ray_probe.config import ProbeConfig
from support.models import character_tokenizer, probe_config, save_checkpoint, tiny_gpt2

BOS = "<s>"
MARKS = (BOS, "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_CHARACTERS = "abcdefghijklmnopqrstuvwxyz ,.-0123456789"
CHAT_VOCABULARY = len(CHAT_CHARACTERS) + 2 + len(MARKS)
TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "tool" %}{{ raise_exception("This model knows no tools") }}{% endif %}
    {%- if message.role == "critic" %}{{ raise_exception("Not known: " + message.content) }}{% endif %}
    {{- "<|" + message.role + "|>" + message.content | trim + "<|end|>" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "<|assistant|>" }}{% endif %}"""


def chat_tokenizer(adds_bos: bool = True, template: str | None = TEMPLATE) -> transformers.PreTrainedTokenizerFast:
    """Returns a character tokenizer with a chat template, and BOS if `adds_bos`."""
    tokenizer = character_tokenizer(CHAT_CHARACTERS)
    tokenizer.add_special_tokens({"bos_token": BOS, "additional_special_tokens": list(MARKS[1:])})
    if adds_bos:
        around = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)])
        tokenizer.backend_tokenizer.post_processor = around
    tokenizer.chat_template = template
    return tokenizer


def chat_checkpoint(directory: Path, tokenizer: transformers.PreTrainedTokenizerFast) -> Path:
    """A checkpoint directory with this tokenizer."""
    tiny_gpt2(CHAT_VOCABULARY, torch.float32, positions=64).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def job_on(checkpoint: Path, prompts: Path) -> Callable[..., ProbeConfig]:
    """Builds configs of two rounds of two shards, with sections to change."""

    def build(**sections: Any) -> ProbeConfig:
        data = {"prompts": str(prompts)} | sections.pop("data", {})
        batch = {"prompts_per_round": 4, "shard_prompts": 2, "rounds": 2} | sections.pop("batch", {})
        generation = {"max_new_tokens": 8} | sections.pop("generation", {})
        return probe_config(checkpoint, data=data, batch=batch, generation=generation, **sections)

    return build


def plain_job(directory: Path, texts: list[str], characters: str, context: int) -> Callable[..., ProbeConfig]:
    """Returns a maker of configs on a checkpoint `c` without a chat template."""
    vocabulary = len(characters) + 2
    checkpoint = save_checkpoint(directory / "c", tiny_gpt2(vocabulary, torch.float32, positions=context), characters)
    return job_on(checkpoint, write_jsonl(directory / "prompts.jsonl", [{"prompt": text} for text in texts]))


def write_jsonl(path: Path, items: list[dict[str, Any]]) -> Path:
    """One object a line."""
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def change_weights(directory: Path) -> None:
    """One bit of the checkpoint's last tensor."""
    data = bytearray((directory / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (directory / "model.safetensors").write_bytes(data)
