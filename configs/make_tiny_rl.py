"""Train the demonstration checkpoint a few steps further, by REINFORCE on correct sums.

The second checkpoint, `models/tiny-rl`, is what `ray-probe compare` compares the first one with. Run
`python configs/make_tiny_rl.py`; it takes about a minute on two cores. Each step samples groups of responses to the
same prompts at temperature 1, and weighs log q of a response by its reward less its group's mean, over the spread.
"""

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sum_examples import draw_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS_A_STEP, GROUP = 32, 8
LEARNING_RATE = 1e-4
CAP = 64
ENDS = (r"(?:^|=)(-?\d+)\.$", r"(?:^|;)(-?\d+)[+-]\d+=-?\d+ ok\.$")
"""Ends of a whole response: the sum, or the sum with a check of it."""


def is_correct(prompt: str, response: str) -> bool:
    """Return whether a response ends with the sum of the prompt's terms."""
    total = sum(int(term) for term in re.findall(r"[+-]?\d+", prompt))
    found = next(filter(None, (re.search(end, response) for end in ENDS)), None)
    return found is not None and int(found[1]) == total


def rewards_of(prompts: list[str], responses: list[str]) -> torch.Tensor:
    """Return each response's advantage within its group: reward less mean, over the spread."""
    correct = [is_correct(prompts[place // GROUP], response) for place, response in enumerate(responses)]
    rewards = torch.tensor(correct, dtype=torch.float32).view(-1, GROUP)
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    return (centred / (rewards.std(dim=1, keepdim=True) + 1e-6)).flatten()


def train(model: Any, tokenizer: Any, steps: int, seed: int, learning_rate: float = LEARNING_RATE) -> Iterator[float]:
    """Train by Adam; yields the share of right sums after each step.

    With the same seed, fewer steps are the first of more.

    Args:
        model: in evaluation mode; trained in place.
        tokenizer: pads on the left.
        steps: of the optimizer.
        seed: of prompts and responses.
        learning_rate: of Adam.
    """
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    drawn = draw_prompts(steps * PROMPTS_A_STEP, seed + 2)
    for first in range(0, len(drawn), PROMPTS_A_STEP):
        prompts = drawn[first : first + PROMPTS_A_STEP]
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        with torch.no_grad():
            sequences = model.generate(
                **batch, do_sample=True, top_k=0, max_new_tokens=CAP, num_return_sequences=GROUP
            )  # fmt: skip
        width = batch["input_ids"].shape[1]
        tokens = sequences[:, width:]
        real = (tokens == tokenizer.eos_token_id).cumsum(dim=1) - (tokens == tokenizer.eos_token_id).long() == 0
        texts = tokenizer.batch_decode(tokens.masked_fill(~real, tokenizer.pad_token_id), skip_special_tokens=True)
        advantages = rewards_of(prompts, texts)
        mask = torch.cat([batch["attention_mask"].repeat_interleave(GROUP, dim=0), real.long()], dim=1)
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        logits = model(input_ids=sequences, attention_mask=mask, position_ids=positions).logits[:, width - 1 : -1]
        log_q = torch.log_softmax(logits, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        loss = -(advantages.unsqueeze(1) * log_q * real).sum() / real.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield sum(is_correct(prompts[place // GROUP], text) for place, text in enumerate(texts)) / len(texts)


def main() -> None:
    """Train, then write the model and the tokenizer."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, default=here / "models" / "tiny", help="checkpoint to start from")
    parser.add_argument("--out", type=Path, default=here / "models" / "tiny-rl", help="directory of the new checkpoint")
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of prompts and responses")
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    tokenizer = AutoTokenizer.from_pretrained(args.start, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(args.start, local_files_only=True).eval()
    for step, right in enumerate(train(model, tokenizer, args.steps, args.seed), start=1):
        print(f"step {step}/{args.steps}  {right:.0%} of the sums are right", flush=True)
    save(model, args.start, args.out)
    print(json.dumps({"parameters": model.num_parameters(), "directory": str(args.out)}))


def save(model: Any, start: Path, directory: Path) -> None:
    """Write the model, and the tokenizer of the checkpoint that it started from."""
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(start / name, directory / name)


if __name__ == "__main__":
    main()
