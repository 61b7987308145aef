"""A small random Llama with a peaked head, its tokenizer and its prompts.

All come from a seed. The head's columns differ in size, so that rows differ in sharpness as in trained models. At
temperature 0.8 and top_p 0.95 a median nucleus holds a few tokens, and a tenth of the nuclei hold dozens.
"""

import argparse
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.measure import parser
from ray_probe.config import GenerationSettings

SEED = 7
SHARPNESS, DECAY = 8.0, 1.0
TEMPERATURE = 0.8


@dataclass(frozen=True)
class Size:
    """Sizes of the model and of a batch of responses; every response ends at the cap."""

    vocabulary: int
    hidden: int
    layers: int
    dtype: str
    responses: int
    prompt_tokens: int
    new_tokens: int

    @property
    def tokens(self) -> int:
        """The response tokens of the batch."""
        return self.responses * self.new_tokens


def options_of(description: str | None, rounds: int, responses: int) -> argparse.ArgumentParser:
    """Return the options that benchmarks on the model share."""
    options = parser(description, rounds)
    for name, value in (("hidden", 256), ("layers", 6), ("responses", responses), ("prompt", 32), ("new", 64)):
        options.add_argument(f"--{name}", type=int, default=value)
    options.add_argument("--dtype", default="float32")
    options.set_defaults(vocabulary=[32_000])
    return options


def size_of(options: argparse.Namespace, **changes: Any) -> Size:
    """Return the sizes that the options select."""
    asked = {
        "vocabulary": options.vocabulary[0], "hidden": options.hidden, "layers": options.layers,
        "dtype": options.dtype, "responses": options.responses, "prompt_tokens": options.prompt,
        "new_tokens": options.new,
    }  # fmt: skip
    return Size(**(asked | changes))


def model(size: Size, device: str) -> LlamaForCausalLM:
    """Return the model in eval mode, with Llama's ratio of layer widths."""
    heads = max(1, size.hidden // 64)
    config = LlamaConfig(
        vocab_size=size.vocabulary, hidden_size=size.hidden, intermediate_size=size.hidden * 43 // 16,
        num_hidden_layers=size.layers, num_attention_heads=heads, num_key_value_heads=heads,
        max_position_embeddings=size.prompt_tokens + size.new_tokens, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(SEED)
        made = LlamaForCausalLM(config).eval()
        column_D = torch.arange(1.0, size.hidden + 1.0) ** -DECAY
        with torch.no_grad():
            made.lm_head.weight.normal_().mul_(column_D * (SHARPNESS / column_D.norm()))
    return made.to(device, getattr(torch, size.dtype))


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words that are numbers; each number is its own id."""
    words = models.WordLevel({str(number): number for number in range(vocabulary)}, unk_token="0")
    built = Tokenizer(words)
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built)


def prompt_ids(size: Size) -> torch.Tensor:
    """Return a prompt for each response, token ids [responses, prompt_tokens]."""
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(1, size.vocabulary, (size.responses, size.prompt_tokens), generator=generator)


def prompts(size: Size) -> list[str]:
    """Return the prompts of `prompt_ids` as texts."""
    return [" ".join(map(str, row)) for row in prompt_ids(size).tolist()]


def settings(size: Size, top_p: float, **changes: Any) -> GenerationSettings:
    """Return the policy and batch sizes; responses end only at the cap."""
    asked = {"temperature": TEMPERATURE, "top_p": top_p, "max_new_tokens": size.new_tokens, "eos_token_ids": ()}
    return GenerationSettings.model_validate(asked | {"gen_batch_size": size.responses} | changes)
