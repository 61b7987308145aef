"""Train the demonstration checkpoint and write its prompts.

A character-level Llama learns sums with the working shown (see `sum_examples.py`). Run `python configs/make_tiny.py`;
it takes a few minutes on two cores. One machine with one version of torch writes the same bytes every time.
"""

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from sum_examples import draw_example, draw_prompts
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"
CHARACTERS = "0123456789+-=;[]. ok"
MAX_POSITIONS = 160
POOL_BATCHES = 16  # examples of 16 batches are sorted by length together, which keeps padding small
REPORT_EVERY_S = 10.0
MUON_LR, ADAMW_LR, WEIGHT_DECAY = 0.02, 3e-3, 0.01  # peaks


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a character, padding and EOS, without BOS.

    A character outside the alphabet is an error.
    """
    vocabulary = {token: i for i, token in enumerate([PAD, EOS, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama of 0.9 million parameters, float32."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    return model


def collate(examples: list[tuple[str, str]], tokenizer: PreTrainedTokenizerFast) -> dict[str, torch.Tensor]:
    """Return right-padded ids, mask and labels of the response and its EOS."""
    prompts = [tokenizer.encode(prompt) for prompt, _ in examples]
    rows = [ids + tokenizer.encode(y) + [tokenizer.eos_token_id] for ids, (_, y) in zip(prompts, examples, strict=True)]
    input_ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(input_ids, -100)
    for i, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        input_ids[i, : len(row)] = torch.tensor(row)
        labels[i, len(prompt) : len(row)] = input_ids[i, len(prompt) : len(row)]
    attention_mask = torch.arange(input_ids.shape[1]) < torch.tensor([[len(row)] for row in rows])
    return {"input_ids": input_ids, "attention_mask": attention_mask.long(), "labels": labels}


def draw_batches(batch_size: int, seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of examples of similar length, in random order, without end."""
    rng = random.Random(seed)
    while True:
        pool = sorted((draw_example(rng) for _ in range(batch_size * POOL_BATCHES)), key=lambda e: len(e[0] + e[1]))
        starts = list(range(0, len(pool), batch_size))
        rng.shuffle(starts)
        for start in starts:
            yield collate(pool[start : start + batch_size], tokenizer)


def learning_rate_scale(step: int, steps: int, warmup: int = 50) -> float:
    """Return a linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices, AdamW for embeddings, head and norms."""
    # With Muon the loss at 500 steps is half of AdamW's.
    matrices = [p for layer in model.model.layers for p in layer.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=ADAMW_LR, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
    ]


def train(model: LlamaForCausalLM, batches: Iterator[dict[str, torch.Tensor]], steps: int) -> None:
    """Train the model in place on the mean loss of a response token."""
    optimizers = build_optimizers(model)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda step: learning_rate_scale(step, steps)) for o in optimizers
    ]
    model.train()
    started = reported = time.monotonic()
    for step in range(1, steps + 1):
        loss = model(**next(batches), use_cache=False).loss
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        if step == steps or time.monotonic() - reported >= REPORT_EVERY_S:
            reported = time.monotonic()
            print(f"step {step}/{steps}  loss {loss.item():.3f} nats/token  {reported - started:.0f} s", flush=True)


def write_prompts(path: Path, prompts: list[str]) -> None:
    """Write JSONL, one `{"id", "prompt"}` a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = ({"id": f"sum-{i:04d}", "prompt": prompt} for i, prompt in enumerate(prompts, start=1))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="directory of models/tiny and prompts/")
    parser.add_argument("--steps", type=int, default=850, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=64, help="examples in a step")
    parser.add_argument("--prompts", type=int, default=512, help="prompts to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, examples and prompts")
    return parser.parse_args()


def main() -> None:
    """Train, then write the model, the tokenizer and the prompts."""
    args = parse_arguments()
    torch.set_num_threads(2)
    torch.manual_seed(args.seed)
    torch.use_deterministic_algorithms(True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer)
    train(model, draw_batches(args.batch_size, args.seed, tokenizer), args.steps)
    directory = args.out / "models" / "tiny"
    model.eval().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    write_prompts(args.out / "prompts" / "tiny.jsonl", draw_prompts(args.prompts, args.seed + 1))
    print(f"{model.num_parameters():,} parameters in {directory}")


if __name__ == "__main__":
    main()
