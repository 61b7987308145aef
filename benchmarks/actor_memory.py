"""Peak memory of a rollout actor above the loaded model, by prompts per round.

Apart from the tokens, the peak must not grow with the number of sequences. Each figure comes from a fresh process that
runs two rounds of the plain class that an actor wraps. The peak is the kernel's (VmHWM), reset after the model is
loaded.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.common import build, prepare_demo
from benchmarks.measure import memory_bytes
from benchmarks.saving import save

PROMPTS = (32, 128)
REPEATS = 3
ROUNDS = 2


def measure(prompts: int) -> float:
    """Return the peak above the loaded model in this process, MB."""
    from ray_probe.fitter.fitter import Fitter
    from ray_probe.run.preparation.prepared import baseline_rule

    prepared = prepare_demo(f"batch.prompts_per_round={prompts}", f"batch.rounds={ROUNDS}")
    rollout = build(prepared)
    fitter = Fitter(baseline_rule(prepared.config), prepared.policy_id)
    Path("/proc/self/clear_refs").write_text("5")
    loaded = memory_bytes("VmRSS")
    for number in range(ROUNDS):
        shards = prepared.plan.round(number)
        rollout.begin(f"round {number}")
        for shard in shards:
            rollout.acknowledge(shard, fitter.accept(rollout.collect(shard).delivery))
        fit = fitter.close_round(number, [shard.index for shard in shards]).for_broadcast()
        for shard in shards:
            rollout.accumulate(shard, fit)
        for start, stop in rollout.layout.buckets():
            rollout.bucket(start, stop)
    return (memory_bytes("VmHWM") - loaded) / 2**20


def main() -> None:
    """Measure each size in fresh processes, in turn; print and save medians."""
    peaks: dict[int, list[float]] = {prompts: [] for prompts in PROMPTS}
    for _ in range(REPEATS):
        for prompts in PROMPTS:
            command = [sys.executable, "-m", "benchmarks.actor_memory", str(prompts)]
            peaks[prompts].append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    medians = {prompts: statistics.median(values) for prompts, values in peaks.items()}
    print("peak above the loaded model, MB (median of 3 processes, min - max)")
    for prompts, values in peaks.items():
        print(f"  {prompts:4d} prompts x 4 responses: {medians[prompts]:6.1f} ({min(values):.1f} - {max(values):.1f})")
    growth = medians[PROMPTS[1]] - medians[PROMPTS[0]]
    print(f"  growth: {growth:.1f} MB for {PROMPTS[1] - PROMPTS[0]} more prompts (at most 16 MB is the target)")
    save("actor_memory", {"peak_mb": peaks, "median_mb": medians, "growth_mb": growth, "rounds": ROUNDS})


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(measure(int(sys.argv[1])))
    else:
        main()
