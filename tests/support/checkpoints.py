"""A tiny checkpoint directory with prompts, and a config that uses them."""

import json
from pathlib import Path
from typing import Any

from support.models import character_tokenizer, tiny_llama

CHARACTERS = "0123456789+="


def write_checkpoint(directory: Path, seed: int = 0) -> Path:
    """A Llama of a few thousand parameters that ends its responses by itself, mostly."""
    model = tiny_llama(len(CHARACTERS) + 2, seed=seed, positions=64)
    model.save_pretrained(directory)
    character_tokenizer(CHARACTERS).save_pretrained(directory)
    return directory


def write_prompts(path: Path, count: int = 24) -> Path:
    """Sums of one to four numbers: prompts of different lengths."""
    lines = ["+".join(str((i * 7 + j * j) % 97) for j in range(1 + i % 4)) + "=" for i in range(count)]
    path.write_text("".join(json.dumps({"prompt": f"{i % 10}+{line}"}) + "\n" for i, line in enumerate(lines)))
    return path


def write_shadows(directory: Path) -> None:
    """Write files with the names of libraries, whose import fails."""
    for name in ("tokenizers", "torch", "numpy"):
        (directory / f"{name}.py").write_text("raise ImportError('a file of the working directory')")


def raw_config(directory: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """Return the config of a small run; makes checkpoint and prompts if missing."""
    if not (directory / "model").exists():
        write_checkpoint(directory / "model")
        write_prompts(directory / "prompts.jsonl")
    raw: dict[str, dict[str, Any]] = {
        "model": {"path": str(directory / "model")},
        "data": {"prompts": str(directory / "prompts.jsonl")},
        "batch": {"prompts_per_round": 6, "responses_per_prompt": 3, "shard_prompts": 1, "rounds": 3},
        "generation": {"max_new_tokens": 12, "top_p": 0.9},
        "output": {"dir": str(directory / "runs")},
    }
    for name, values in sections.items():
        raw.setdefault(name, {}).update(values)
    return raw
