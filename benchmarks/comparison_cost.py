"""The cost of a comparison: its speed against plain sampling, and its memory.

Speed: the demo and its second checkpoint, tokens/s of whole shards of a comparison against plain sampling of the same
responses in the same batches. Memory: a random Llama of about 100 M parameters, peaks above the loaded weights in
fresh processes: sampling and scoring a shard with one model, a comparison, and a comparison with its parts. The last
works on two rounds, so that both models are loaded again, and its peak is set against the forecast of one layer's
gradient and activations.
"""

import copy
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks import language_model
from benchmarks.common import prepare_demo
from benchmarks.language_model import Size
from benchmarks.measure import MEGABYTE, interleaved, peak_bytes, peak_in_fresh_process, ratio, shown
from benchmarks.saving import ROOT, save
from ray_probe.checkpoints.memory_forecast import estimate
from ray_probe.config.loading import config_from_dict
from ray_probe.fitter.fitter import Fitter
from ray_probe.rollout.builder import RolloutBuilder, build_rollout
from ray_probe.rollout.comparison import Comparison
from ray_probe.run.preparation.plan import PromptRef, Shard
from ray_probe.run.preparation.prepared import baseline_rule

ROUNDS, SHARDS = 5, 4
SIZE = Size(vocabulary=32_000, hidden=768, layers=7, dtype="float32", responses=16, prompt_tokens=32, new_tokens=64)
KINDS = ("one model", "comparison", "comparison with parts")


def worked(comparison: Comparison, fitter: Fitter, shards: list[Shard]) -> None:
    """Collect a round of shards, fit it and form their sums."""
    comparison.begin(f"round {shards[0].round}")
    for shard in shards:
        comparison.acknowledge(shard, fitter.accept(comparison.collect(shard).delivery))
    fit = fitter.close_round(shards[0].round, [shard.index for shard in shards]).for_broadcast()
    for shard in shards:
        comparison.accumulate(shard, fit)


def speed() -> dict[str, Any]:
    """Return tokens/s of a comparison over those of sampling its responses."""
    against = f"compare.against={ROOT / 'configs/models/tiny'}"
    prepared = prepare_demo("model.path=configs/models/tiny-rl", against, "batch.rounds=1", "generation.top_p=0.95")
    assert prepared.against is not None
    places = [(one.directory, None) for one in (prepared.against, prepared.checkpoint)]
    comparison = RolloutBuilder().compare(prepared.config, places, prepared.policy_id)
    shards = list(prepared.plan.round(0)[:SHARDS])

    def sampled() -> None:
        for shard in shards:
            for side in (0, 1):
                texts, half = [ref.text for ref in shard.prompts], shard.responses_per_prompt // 2
                comparison.processors[side].generate(texts, half, shard.response_seeds(side))

    def compared() -> None:
        worked(comparison, Fitter(baseline_rule(prepared.config), prepared.policy_id), shards)

    seconds = interleaved({"sampling": sampled, "comparison": compared}, ROUNDS, "cpu")
    return {"speed_over_sampling": ratio(seconds["sampling"], seconds["comparison"]), "seconds": seconds}


def checkpoints(directory: Path) -> None:
    """Write two random checkpoints of `SIZE`, which differ a little."""
    first = language_model.model(SIZE, "cpu")
    second = copy.deepcopy(first)
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.001)
    for name, model in (("a", first), ("b", second)):
        model.save_pretrained(directory / name)
        language_model.tokenizer(SIZE.vocabulary).save_pretrained(directory / name)


def settings(kind: str, directory: Path) -> dict[str, Any]:
    """Return the configuration of a kind of work."""
    raw: dict[str, Any] = {
        "model": {"path": str(directory / "b")}, "data": {"prompts": language_model.prompts(SIZE)[:4]},
        "batch": {"prompts_per_round": 4, "shard_prompts": 4, "responses_per_prompt": 4, "rounds": 1},
        "generation": {"max_new_tokens": SIZE.new_tokens, "eos_token_ids": []},
    }  # fmt: skip
    if kind != KINDS[0]:
        raw["compare"] = {"against": str(directory / "a"), "parts": kind == KINDS[2]}
    return raw


def measure(kind: str, directory: Path) -> int:
    """Return the peak of a shard's work above the loaded weights, bytes."""
    torch.set_num_threads(1)
    raw = settings(kind, directory)
    config = config_from_dict(raw)
    shard = Shard(0, 0, tuple(PromptRef(n, 0, text) for n, text in enumerate(raw["data"]["prompts"])), 0, 4)
    if kind == KINDS[0]:
        rollout = build_rollout(config, directory / "b", "policy")
        return peak_bytes(lambda: rollout.collect(shard), "cpu")
    comparison = RolloutBuilder().compare(config, [(directory / "a", None), (directory / "b", None)], "policy")
    fitter = Fitter(baseline_rule(config), "policy")

    def rounds() -> None:
        for number in (0, 1):
            worked(comparison, fitter, [replace(shard, round=number)])

    return peak_bytes(rounds, "cpu")


def forecast(directory: Path) -> dict[str, int]:
    """Return the forecast of what parts take beside the weights, bytes."""
    config = config_from_dict(settings(KINDS[2], directory))
    longest = SIZE.prompt_tokens
    found = estimate(config, directory / "b", AutoConfig.from_pretrained(directory / "b"), longest, None, "multiplied")
    return {"gradient": found.gradients, "activations": found.activations, "logits": found.logits, "cache": found.cache}


def main() -> None:
    """Measure, print, save."""
    found = speed()
    print(f"  tokens/s over those of plain sampling: {shown(found['speed_over_sampling'], 2)} (at least 0.65)")
    with tempfile.TemporaryDirectory() as parent:
        checkpoints(Path(parent))
        parameters = sum(p.numel() for p in language_model.model(SIZE, "cpu").parameters())
        peaks = {
            kind: peak_in_fresh_process("benchmarks.comparison_cost", [], {"kind": kind, "directory": parent})
            for kind in KINDS
        }
        expected = forecast(Path(parent))
    for kind, peak in peaks.items():
        print(f"  {kind:22s}: {peak / MEGABYTE:6.0f} MB above the loaded weights, {parameters / 1e6:.0f} M parameters")
    total = expected["gradient"] + max(expected["activations"] + expected["logits"], expected["cache"])
    print(f"  forecast of one layer's gradient and activations, with parts: {total / MEGABYTE:.0f} MB")
    sizes = {"parameters": parameters, "peak_bytes_above_weights": peaks, "forecast_bytes_with_parts": expected}
    save("comparison_cost", {**found, **sizes})


if __name__ == "__main__":
    if "--peak" in sys.argv:
        case = json.loads(sys.argv[-1])
        print(measure(case["kind"], Path(case["directory"])))
    else:
        main()
