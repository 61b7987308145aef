"""Short runs of real trainers on the demo checkpoint, on a CPU.

Import this inside a slow test: it needs TRL, which `make test` does not install.
"""

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from ray_probe.integrations import ProbeCallback

DEMO = str(Path(__file__).parents[2] / "configs" / "models" / "tiny")
QUIET: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "bf16": False, "logging_steps": 1000}
SMALL = {**QUIET, "per_device_train_batch_size": 8, "num_generations": 4, "max_completion_length": 40}


class Remember(TrainerCallback):
    """Keeps the weights of every save."""

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.weights[state.global_step] = {name: one.detach().clone() for name, one in model.state_dict().items()}


class Between(TrainerCallback):
    """Times what a trainer does between two steps: to log, and to save where it does."""

    def __init__(self) -> None:
        self.with_save: list[float] = []
        self._since, self._saved = 0.0, False

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self._since, self._saved = time.perf_counter(), False

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        self._saved = True

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if self._saved:
            self.with_save.append(time.perf_counter() - self._since)


class TimedProbeCallback(ProbeCallback):
    """Times its own saves."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: list[float] = []

    def on_save(self, *args: Any, **kwargs: Any) -> None:
        since = time.perf_counter()
        super().on_save(*args, **kwargs)
        self.seconds.append(time.perf_counter() - since)


def sums(count: int) -> list[tuple[str, str]]:
    """Prompts with their answers: `17+5=`, `22.`."""
    pairs = [(1 + i * 7 % 89, 1 + i * i % 83) for i in range(count)]
    return [(f"{first}+{second}=", f"{first + second}.") for first, second in pairs]


def prompts() -> Dataset:
    """Prompts as GRPO reads them."""
    return Dataset.from_dict({"prompt": [prompt for prompt, _ in sums(64)]})


def rightness(prompts: Sequence[str], completions: Sequence[str], **kwargs: Any) -> list[float]:
    """Reward 1 for a response that ends with the sum, and up to 0.2 for a short one, so that groups differ."""
    rewards = []
    for prompt, response in zip(prompts, completions, strict=True):
        total = sum(int(term) for term in re.findall(r"\d+", prompt))
        found = re.search(r"(?:^|=)(-?\d+)\.$", response)
        rewards.append(float(found is not None and int(found[1]) == total) + 0.2 / (1 + len(response)))
    return rewards


def grpo(output: Path, callbacks: Sequence[Any], steps: int, every: int) -> None:
    """Train by TRL's GRPO; one checkpoint stays."""
    arguments = GRPOConfig(
        output_dir=str(output), max_steps=steps, save_steps=every, save_total_limit=1, learning_rate=1e-4, **SMALL
    )
    GRPOTrainer(DEMO, rightness, args=arguments, train_dataset=prompts(), callbacks=list(callbacks)).train()


def sft(output: Path, callbacks: Sequence[Any], steps: int, every: int, **options: Any) -> None:
    """Train by TRL's SFT; one checkpoint stays."""
    rows = Dataset.from_dict({"text": [prompt + answer for prompt, answer in sums(64)]})
    arguments = SFTConfig(
        output_dir=str(output), max_steps=steps, save_steps=every, save_total_limit=1, learning_rate=1e-4,
        per_device_train_batch_size=8, max_length=40, **QUIET,
    )  # fmt: skip
    SFTTrainer(DEMO, args=arguments, train_dataset=rows, callbacks=list(callbacks), **options).train()


def plain(output: Path, callbacks: Sequence[Any], steps: int, every: int) -> None:
    """Train by transformers' own Trainer; one checkpoint stays."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    texts = tokenizer(["".join(pair) for pair in sums(64)], padding="max_length", max_length=16)["input_ids"]
    arguments = TrainingArguments(
        output_dir=str(output), max_steps=steps, save_steps=every, save_total_limit=1, learning_rate=1e-4,
        per_device_train_batch_size=8, **QUIET,
    )  # fmt: skip
    Trainer(
        AutoModelForCausalLM.from_pretrained(DEMO), arguments, processing_class=tokenizer, callbacks=list(callbacks),
        train_dataset=[{"input_ids": text, "labels": text} for text in texts],
    ).train()  # fmt: skip
