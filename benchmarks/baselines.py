"""The four baselines on the demo: advantages and the gradient's noise under each.

Advantages of all modes come from one run (paired, leave-one-out, errors by shard). The covariance trace of the gradient
needs a run for each mode; all runs have the same responses, because each response has its own seed.
"""

from typing import Any

from benchmarks.common import run_in_process
from benchmarks.saving import save
from ray_probe.core.estimator.baselines import MODES

ADVANTAGE_ROUNDS = 16
GRADIENT_ROUNDS = 8


def main() -> None:
    """Run the demo for the advantages, then for each mode's gradient; print and save."""
    result = run_in_process(f"batch.rounds={ADVANTAGE_ROUNDS}")
    advantages: dict[str, Any] = {
        key: result[key]
        for key in ("advantage_mean_square", "advantage_mean_square_ratio", "advantage_paired", "entropy", "counts")
    }
    print(f"advantages, {result['counts']['sequences']} responses of {ADVANTAGE_ROUNDS * 32} prompts, leave_one_out")
    for mode in MODES:
        ratio = result["advantage_mean_square_ratio"][mode]
        square = result["advantage_mean_square"][mode]
        print(f"  {mode:12s} {square:7.2f} nats^2/token   ratio to none {ratio['value']:.3f} +- {ratio['se']:.3f}")
    for pair in result["advantage_paired"]:
        name = f"{pair['mode']} - {pair['against']}"
        print(f"  {name:24s} {pair['difference']:+7.3f} +- {pair['se']:.3f} nats^2/token")
    gradient = {}
    for mode in MODES:
        run = run_in_process(f"batch.rounds={GRADIENT_ROUNDS}", f"estimator.baseline.mode={mode}")
        gradient[mode] = run["gradient"]
    print(f"gradient, {GRADIENT_ROUNDS * 128} responses, the same for every mode")
    for mode in MODES:
        trace = gradient[mode]["trace_cov"]
        print(f"  {mode:12s} trace_cov {trace:10.0f}   ratio to none {trace / gradient['none']['trace_cov']:.3f}")
    save("baselines", {"advantages": advantages, "gradient_by_mode": gradient})


if __name__ == "__main__":
    main()
