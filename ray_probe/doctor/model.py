"""Sample, score and differentiate the loaded model, on request."""

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from ray_probe.checkpoints.memory_forecast import size
from ray_probe.config import ProbeConfig
from ray_probe.core.estimator.parity import ParityStats, violation
from ray_probe.doctor.checks import Case, Finding
from ray_probe.doctor.devices import free_device
from ray_probe.errors import ParityError
from ray_probe.fitter.fitter import Fitter
from ray_probe.run.preparation.prepared import PreparedRun, baseline_rule

if TYPE_CHECKING:
    from ray_probe.rollout.comparison import Comparison
    from ray_probe.rollout.rollout import Rollout

TRIAL_PROMPTS, TRIAL_RESPONSES, TRIAL_TOKENS = 2, 2, 16
COMPARED_RESPONSES = 4  # a comparison needs two pairs
LEFT_OUT = "whether the loaded model can be sampled, scored and differentiated"


def not_loaded(case: Case) -> Finding:
    """Name the checks that need `--load`."""
    return Finding(f"not looked at: {LEFT_OUT}, and whether an adapter moves its logits", "add --load", looked=False)


def loaded(case: Case) -> Finding:
    """Load the model on this machine, and process a few short responses as a run does."""
    import torch

    config, memory = case.run, case.prepared_run.memory
    cuda = config.cluster.gpus_per_actor > 0 and torch.cuda.is_available()
    name, free = free_device(cuda)
    needed = memory.weights + memory.gradients
    if needed > free:
        what = f"not looked at: {LEFT_OUT}; weights and gradients take {size(needed)}, {name} here has {size(free)}"
        return Finding(what, "run doctor --load where there is room", looked=False)
    started = time.monotonic()
    cap = min(TRIAL_TOKENS, config.generation.max_new_tokens)
    short = config.model_copy(update={"generation": config.generation.model_copy(update={"max_new_tokens": cap})})
    found = _tried(case.prepared_run, short, "cuda" if cuda else "cpu")
    return Finding(f"{found} ({time.monotonic() - started:.0f} s)")


def _tried(prepared: PreparedRun, config: ProbeConfig, device: str) -> str:
    """Load the model and process a small shard; returns the finding.

    Raises:
        InputError: an actor would refuse to load the model.
        NonFiniteError: logits, entropies or the gradient hold NaN or infinity.
        ParityError: the scored policy is not the policy that sampled.
    """
    from ray_probe.rollout.builder import RolloutBuilder

    found, policy_id, rule = prepared.checkpoint, prepared.policy_id, baseline_rule(config)
    rollout: Rollout | Comparison
    if prepared.against is None:
        rollout = RolloutBuilder().load(config, found.directory, found.adapter, policy_id, device)
    else:
        places = [(one.directory, one.adapter) for one in (prepared.against, found)]
        rollout = RolloutBuilder().compare(config, places, policy_id, device)
    first = prepared.plan.round(0)[0]
    shortest = tuple(sorted(first.prompts, key=lambda prompt: len(prompt.text))[:TRIAL_PROMPTS])
    group = TRIAL_RESPONSES if prepared.against is None else COMPARED_RESPONSES
    shard = replace(first, prompts=shortest, responses_per_prompt=group)
    rollout.begin("doctor")
    collected, fitter = rollout.collect(shard), Fitter(rule, policy_id)
    fitter.accept(collected.delivery)
    _check_parity(config, collected.parity)
    report = rollout.accumulate(shard, fitter.close_round(shard.round, [shard.index]))
    norm = report.gradient_norm_sq**0.5
    if report.sums.change is not None:
        _check_parity(config, report.sums.change.parts.parity)
    if prepared.against is not None:
        gap = f"the mean parity gap is {collected.parity.mean_gap:.1e} nats"
        return f"both checkpoints loaded on {device}; of {collected.tokens} tokens of both {gap}"
    frozen = f", {len(rollout.frozen)} frozen ones left out" if rollout.frozen else ""
    return (
        f"loaded on {device}, gradient of {len(rollout.layout.names)} parameters{frozen}; of {collected.tokens} tokens "
        f"the mean parity gap is {collected.parity.mean_gap:.1e} nats and the gradient's norm {norm:.3g}"
    )


def _check_parity(config: ProbeConfig, parity: ParityStats) -> None:
    if problem := violation(parity, config.model.dtype, config.generation.parity_tolerance):
        raise ParityError(f"{problem}; see whether the model's cache and its full forward pass agree")
