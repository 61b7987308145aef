"""Sampling and a probe step against `generate` and naive teacher forcing.

There is one shard, so that both sides sample in the same batch. Its fit is `in_sample`, because without its own record
there is nothing to fit on.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import decoding, language_model, probe_step
from benchmarks.measure import interleaved, ratio, shown
from benchmarks.saving import save_for
from ray_probe.model.sequences import TokenRow
from ray_probe.sequence_processor import SequenceProcessor

Case = dict[str, Any]


def naive(step: probe_step.Problem, sampling: decoding.Problem) -> None:
    """Sample with `generate`, then run the naive step."""
    width = step.size.prompt_tokens
    rows: list[TokenRow] = [(row[:width], row[width:]) for row in sampling.generate().cpu()]
    step.naive([rows])


def timed(size: language_model.Size, top_p: float, options: Any) -> Case:
    """Time both sides; return seconds and ratios."""
    step = probe_step.Problem(size, top_p, options.device, SequenceProcessor, size.responses, "in_sample")
    sampling = decoding.Problem(size, top_p, options.device)
    variants: dict[str, Callable[[], object]] = {
        "naive": lambda: naive(step, sampling), "two": lambda: step.ours(2), "one": lambda: step.ours(1),
    }  # fmt: skip
    seconds = interleaved(variants, options.rounds, options.device)
    speed = {name: ratio(seconds["naive"], seconds[name]) for name in ("two", "one")}
    rate = {name: size.tokens / min(values) for name, values in seconds.items()}
    for name in ("two", "one"):
        passes = "two passes" if name == "two" else "one pass"
        speeds = f"{rate[name]:.0f} tokens/s against {rate['naive']:.0f}"
        print(f"  top_p={top_p:g} {passes:10s} x{shown(speed[name], 2):20s} {speeds}")
    return {"top_p": top_p, "naive_over": speed, "tokens_per_s": rate, "seconds": seconds}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, save."""
    options = language_model.options_of(__doc__, rounds=5, responses=16)
    options.set_defaults(top_p=[0.95])
    chosen = options.parse_args(arguments or [])
    torch.set_num_threads(chosen.threads)
    size = language_model.size_of(chosen)
    print(f"  {size}")
    cases = [timed(size, top_p, chosen) for top_p in chosen.top_p]
    save_for("end_to_end", chosen, {"size": vars(size), "seed": language_model.SEED, "cases": cases})


if __name__ == "__main__":
    main(sys.argv[1:])
