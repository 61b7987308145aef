"""Real PEFT adapters on tiny checkpoints."""

import warnings
from pathlib import Path
from typing import Any

import peft
import torch

from ray_probe.checkpoints import load_model


def write_adapter(directory: Path, checkpoint: Path, seed: int = 0, spread: float = 0.1, **settings: Any) -> Path:
    """A LoRA on the checkpoint as a trainer saves it; its `lora_B` has this spread (0: untrained)."""
    torch.manual_seed(seed)
    plain = {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    own = torch.Generator().manual_seed(seed)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(load_model(checkpoint, "float32"), peft.LoraConfig(**plain | settings))
        for name, parameter in wrapped.named_parameters():
            if parameter.requires_grad and ("lora_B" in name or "embedding" in name or "modules_to_save" in name):
                parameter += torch.randn(parameter.shape, generator=own) * spread
        wrapped.save_pretrained(str(directory))
    return directory
