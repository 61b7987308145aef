"""Two tiny policies beside the demo, on which baselines are compared.

`alike` adds three numbers of two digits: all prompts are alike, so a prompt's other responses tell little. `words`
continues English sentences with a BPE vocabulary of 2,000 tokens; it is hardly trained.
"""

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.saving import ROOT

sys.path.insert(0, str(ROOT / "configs"))
import make_tiny
import sum_examples

ALIKE_STEPS, WORDS_STEPS, BATCH = 250, 200, 64
VOCABULARY, WORDS_SHOWN, MOST_WORDS = 2000, 4, 24


def _terms(rng: random.Random) -> list[int]:
    return [rng.randint(10, 99) for _ in range(3)]


def alike(directory: Path, prompts: int) -> tuple[Path, Path]:
    """Train the policy whose prompts are alike; returns checkpoint and prompts file."""
    torch.manual_seed(0)
    rng, tokenizer = random.Random(1), make_tiny.build_tokenizer()
    model = make_tiny.build_model(tokenizer)

    def batches() -> Iterator[dict[str, torch.Tensor]]:
        while True:
            drawn = [_terms(rng) for _ in range(BATCH)]
            examples = [(sum_examples.prompt_text(terms), sum_examples.draw_response(terms, rng)) for terms in drawn]
            yield make_tiny.collate(examples, tokenizer)

    make_tiny.train(model, batches(), ALIKE_STEPS)
    chosen = random.Random(2)
    texts = list({sum_examples.prompt_text(_terms(chosen)): None for _ in range(3 * prompts)})[:prompts]
    return _saved(directory, model, tokenizer, texts)


def words(directory: Path, prompts: int) -> tuple[Path, Path]:
    """Train the policy with a BPE vocabulary; returns checkpoint and prompts file."""
    torch.manual_seed(0)
    sentences = _sentences()
    tokenizer = _bpe(sentences)
    model = _qwen2(tokenizer)
    rng, optimizer = random.Random(1), torch.optim.AdamW(model.parameters(), 2e-3)
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    model.train()
    for _ in range(WORDS_STEPS):
        rows = [[*tokenizer.encode(sentence)[:64], eos] for sentence in rng.sample(sentences, BATCH)]
        ids = torch.full((BATCH, max(map(len, rows))), pad)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row)
        loss = model(input_ids=ids, attention_mask=(ids != pad).long(), labels=ids.masked_fill(ids == pad, -100)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"  words: loss {loss.item():.2f} nats a token after {WORDS_STEPS} steps")
    random.Random(3).shuffle(sentences)
    starts = list({" ".join(sentence.split()[:WORDS_SHOWN]): None for sentence in sentences})[:prompts]
    return _saved(directory, model, tokenizer, starts)


def _sentences() -> list[str]:
    """Return the English sentences of Python's own documentation."""
    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics)))
    found = re.findall(r"[A-Z][a-z][^.*`=_\"]{20,}\.", text)
    return sorted({sentence for sentence in found if WORDS_SHOWN < len(sentence.split()) <= MOST_WORDS})


def _bpe(sentences: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<eos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(sentences, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left", model_max_length=128
    )


def _qwen2(tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model


def _saved(directory: Path, model: Any, tokenizer: Any, prompts: list[str]) -> tuple[Path, Path]:
    checkpoint, file = directory / "checkpoint", directory / "prompts.jsonl"
    model.eval().save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    make_tiny.write_prompts(file, prompts)
    return checkpoint, file
