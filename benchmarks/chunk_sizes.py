"""Sizes of chunks, blocks, tiles and micro-batches: their time over the default's.

Ratios are taken within each round; a size far below 1 would be a better default.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks import fused_head, language_model, probe_step
from benchmarks.measure import interleaved, ratio
from benchmarks.saving import save_for
from ray_probe.core.policy import head_products, logits, sampling

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
MICRO_BATCHES = (1, 2, 4, 8, 16)
DEFAULT_MICRO_BATCH = 8
Case = dict[str, Any]


@contextmanager
def _block(factor: float, device: str) -> Iterator[None]:
    before = head_products.BLOCK_ELEMENTS
    head_products.BLOCK_ELEMENTS = int(before * factor)
    try:
        yield
    finally:
        head_products.BLOCK_ELEMENTS = before


@contextmanager
def _chunk(factor: float, device: str) -> Iterator[None]:
    before = sampling.CHUNK_ELEMENTS
    sampling.CHUNK_ELEMENTS = int(before * factor)
    try:
        yield
    finally:
        sampling.CHUNK_ELEMENTS = before


@contextmanager
def _tile(factor: float, device: str) -> Iterator[None]:
    before = dict(logits.TILE_ELEMENTS)
    logits.TILE_ELEMENTS[device] = int(before[device] * factor)
    try:
        yield
    finally:
        logits.TILE_ELEMENTS.update(before)


SIZES: dict[str, Callable[[float, str], Any]] = {
    "rows of a block of logits": _block,
    "logits of a chunk of rows": _chunk,
    "logits of a tile": _tile,
}


def time_head(top_p: float, options: Any) -> list[Case]:
    """Time the fused head, forward and backward, by each size."""
    sizes = {"vocabulary": 32_000, "top_p": top_p, "tokens": 512, "hidden": 256, "dtype": "float32"}
    problem, found = fused_head.Problem(sizes, options.device), []
    for name, changed in SIZES.items():

        def run(factor: float, changed: Callable[[float, str], Any] = changed) -> None:
            with changed(factor, options.device):
                problem.fused()

        seconds = interleaved({str(f): lambda f=f, run=run: run(f) for f in FACTORS}, options.rounds, options.device)
        found.append(_printed(f"top_p={top_p:g} {name}", seconds, "1.0") | {"top_p": top_p})
    return found


def time_micro_batches(options: Any) -> Case:
    """Time a step with one pass, by sequences in a micro-batch."""
    problem = probe_step.Problem(language_model.size_of(options), 0.95, options.device)

    def run(size: int) -> None:
        generation = problem.processor.generation
        problem.processor.generation = generation.model_copy(update={"tf_batch_size": size})
        problem.ours(1)

    seconds = interleaved({str(n): lambda n=n: run(n) for n in MICRO_BATCHES}, options.rounds, options.device)
    return _printed("sequences in a micro-batch", seconds, str(DEFAULT_MICRO_BATCH))


def _printed(name: str, seconds: dict[str, list[float]], default: str) -> Case:
    over = {size: ratio(values, seconds[default]) for size, values in seconds.items()}
    print(f"  {name:38s} " + "  ".join(f"{size}: {value['median']:.2f}" for size, value in over.items()))
    return {"what": name, "default": default, "time_over_default": over, "seconds": seconds}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, save."""
    options = language_model.options_of(__doc__, rounds=5, responses=16)
    chosen = options.parse_args(arguments or [])
    torch.set_num_threads(chosen.threads)
    cases = [case for top_p in chosen.top_p for case in time_head(top_p, chosen)]
    save_for("chunk_sizes", chosen, {"cases": [*cases, time_micro_batches(chosen)]})


if __name__ == "__main__":
    main(sys.argv[1:])
