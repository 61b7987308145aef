"""Real PEFT adapters on tiny checkpoints."""

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import torch

from ray_probe.checkpoints.load import load_model

MOVED = r"lora_B|embedding|modules_to_save|tokens_delta|bias$"


def write_adapter(
    directory: Path, checkpoint: Path, seed: int = 0, spread: float = 0.1, moved: str = MOVED, **settings: Any
) -> Path:
    """A LoRA on the checkpoint as a trainer saves it.

    Args:
        directory: where it is written.
        checkpoint: its base model.
        seed: of its numbers.
        spread: standard deviation of what training has added (0: untrained).
        moved: expression of the names of the trained parameters that training has changed.
        settings: of the LoraConfig.
    """
    torch.manual_seed(seed)
    plain = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    own = torch.Generator().manual_seed(seed)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(load_model(checkpoint, "float32"), peft.LoraConfig(**plain | settings))
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and re.search(moved, name):
                parameter += torch.randn(parameter.shape, generator=own) * spread
        wrapped.save_pretrained(str(directory))
    return directory
