"""Five baselines on three policies: advantages and the gradient's noise under each.

All baselines of a row have the same responses, and each shard's baseline is fitted without the shard
(`benchmarks.baseline_runs`). Errors take shards as clusters; the ratio of traces has a jackknife error over shards.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.baseline_policies import alike, words
from benchmarks.baseline_runs import BASELINES, Runs, run_of, square_ratio, trace, trace_ratio
from benchmarks.saving import save

GROUPS = (1, 2, 4, 8)
ROUNDS, SHARDS = 4, 8
LONG_GROUP, LONG_ROUNDS = 4, 16
"""On the demo, 2,048 responses of 512 prompts."""
SEEDS = (0, 1, 2)
"""Of that run: one seed alone says little about the ratio of traces."""
PROMPTS = ROUNDS * SHARDS * 16


def figures_of(runs: Runs) -> dict[str, Any]:
    """Return the figures of each baseline, and the paired difference."""
    measured = runs.measured()
    tokens_S, responses_S, round_S = (np.array(one) for one in (runs.tokens_S, runs.responses_S, runs.round_S))
    none, everything = measured["none"], np.arange(len(round_S))
    figures = {}
    for name in BASELINES:
        one = measured[name]
        trace_cov, snr = trace(one, responses_S, round_S, everything)
        figures[name] = {
            "mean_square": square_ratio(one.square_S, tokens_S)._asdict(),
            "mean_square_ratio": square_ratio(one.square_S, none.square_S)._asdict(),
            "trace_cov": trace_cov,
            "trace_ratio": trace_ratio(one, none, responses_S, round_S)._asdict(),
            "snr": snr,
        }
    better = min(("residual_mu", "logits"), key=lambda name: figures[name]["mean_square"]["value"])
    paired = square_ratio(measured["recommended"].square_S - measured[better].square_S, tokens_S)
    counts = {"responses": int(responses_S.sum()), "shards": len(round_S), "tokens": int(tokens_S.sum())}
    return counts | {"baselines": figures, "recommended_less_better": {"better": better} | paired._asdict()}


def show(policy: str, group: int, figures: dict[str, Any], seconds: float) -> None:
    """Print the figures of a policy and a number of responses a prompt."""
    print(f"{policy}, {group} a prompt, {figures['responses']} responses ({seconds:.0f} s)")
    for name, one in figures["baselines"].items():
        square, ratio = one["mean_square_ratio"], one["trace_ratio"]
        print(
            f"  {name:12s} mean square to none {square['value']:.3f} +- {square['se']:.3f}   "
            f"trace to none {ratio['value']:.3f} +- {ratio['se']:.3f}   snr {one['snr']:.2f}"
        )
    paired = figures["recommended_less_better"]
    print(f"  recommended - {paired['better']}: {paired['value']:+.3f} +- {paired['se']:.3f} nats^2/token", flush=True)


def main() -> None:
    """Measure all policies, print and save."""
    found: dict[str, Any] = {"demo": {}, "alike": {}, "words": {}}
    for group in GROUPS:
        rounds = LONG_ROUNDS if group == LONG_GROUP else ROUNDS
        found["demo"][str(group)] = _measured("demo", None, None, group, rounds, SHARDS)
    by_seed = {"0": found["demo"][str(LONG_GROUP)]}
    for seed in SEEDS[1:]:
        by_seed[str(seed)] = _measured("demo", None, None, LONG_GROUP, LONG_ROUNDS, SHARDS, seed)
    with tempfile.TemporaryDirectory() as directory:
        for name, train in (("alike", alike), ("words", words)):
            checkpoint, prompts = map(str, train(Path(directory) / name, PROMPTS))
            for group in GROUPS:
                found[name][str(group)] = _measured(name, checkpoint, prompts, group, ROUNDS, SHARDS)
    seeds = {seed: figures["baselines"]["recommended"] for seed, figures in by_seed.items()}
    save("baselines", {"policies": found, "demo_by_seed": seeds})


def _measured(
    policy: str, checkpoint: str | None, prompts: str | None, group: int, rounds: int, shards: int, seed: int = 0
) -> dict[str, Any]:
    started = time.monotonic()
    runs = run_of(checkpoint, prompts, group, rounds, shards, seed)
    runs.run()
    figures = figures_of(runs)
    show(policy, group, figures, time.monotonic() - started)
    return figures


if __name__ == "__main__":
    main()
