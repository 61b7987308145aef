"""Padding in micro-batches at the presets' shard sizes, without a model.

Lengths of responses are drawn: `even` from 1 to the cap, `short` geometric with a mean of a quarter of the cap,
`capped` like `short` but with a third of the responses at the cap. For comparison, micro-batches of the same number of
sequences are taken in the order of arrival.
"""

import argparse
import sys
from typing import Any

import numpy as np

from benchmarks.saving import ROOT, save
from ray_probe.config import ProbeConfig, load_config
from ray_probe.model.micro_batches import plan_micro_batches

SEED = 7
PRESETS = ("tiny", "gpu_1", "gpu_8", "cluster_1p5b")
SHARDS = 20
PROMPTS = {"tiny": (4, 24)}
LONG_PROMPTS = (24, 88)  # tokens of the demo's sums in a chat template, at least and at most
Case = dict[str, Any]


def lengths(kind: str, cap: int, count: int, numbers: np.random.Generator) -> np.ndarray[Any, Any]:
    """Draw lengths of responses, in tokens."""
    if kind == "even":
        return numbers.integers(1, cap + 1, count)
    short = np.minimum(numbers.geometric(4.0 / cap, count), cap)
    return np.where(numbers.random(count) < 1 / 3, cap, short) if kind == "capped" else short


def padding(batches: list[list[int]], sizes: list[int]) -> float:
    """Return the share of all positions that hold no token."""
    positions = sum(len(batch) * max(sizes[place] for place in batch) for batch in batches)
    return 1.0 - sum(sizes) / positions


def measured(name: str, kind: str) -> Case:
    """Return padding and micro-batches per shard, over some shards."""
    config: ProbeConfig = load_config(ROOT / "configs" / f"{name}.yaml")
    generation, batch = config.generation, config.batch
    numbers = np.random.default_rng(SEED)
    shares, plain, counts, filled = [], [], [], []
    for _ in range(SHARDS):
        low, high = PROMPTS.get(name, LONG_PROMPTS)
        prompts = numbers.integers(low, high + 1, batch.shard_prompts).repeat(batch.responses_per_prompt)
        sizes = (prompts + lengths(kind, generation.max_new_tokens, len(prompts), numbers)).tolist()
        planned = plan_micro_batches(sizes, generation.tf_batch_size, generation.tf_batch_tokens)
        shares.append(padding(planned, sizes))
        places = list(range(len(sizes)))
        step = generation.tf_batch_size
        unplanned = [places[start : start + step] for start in range(0, len(places), step)]
        plain.append(padding(unplanned, sizes))
        counts.append(len(planned))
        filled.append(len(sizes) / len(planned))
    return {
        "preset": name, "lengths": kind, "sequences": len(sizes), "padding": float(np.mean(shares)),
        "worst_padding": max(shares), "padding_as_they_come": float(np.mean(plain)),
        "micro_batches": float(np.mean(counts)), "sequences_each": float(np.mean(filled)),
        "tf_batch_size": generation.tf_batch_size,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Count, print, save."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments or [])
    cases = [measured(name, kind) for name in PRESETS for kind in ("even", "short", "capped")]
    print(f"  {'preset':14s} {'lengths':8s} sequences  padding (worst of {SHARDS} shards)  as they come  in each")
    for case in cases:
        print(
            f"  {case['preset']:14s} {case['lengths']:8s} {case['sequences']:9d} {case['padding']:8.1%} "
            f"({case['worst_padding']:.1%}) {case['padding_as_they_come']:26.1%} "
            f"{case['sequences_each']:6.1f} of {case['tf_batch_size']}"
        )
    save("micro_batches", {"seed": SEED, "shards": SHARDS, "cases": cases})


if __name__ == "__main__":
    main(sys.argv[1:])
