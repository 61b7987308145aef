"""What only the loaded model can show: where asked for, it is loaded here, sampled, scored and differentiated."""

import time
from dataclasses import replace

from ray_probe.checkpoints.memory_forecast import size
from ray_probe.config import ProbeConfig
from ray_probe.core.estimator.parity import violation
from ray_probe.doctor.checks import Case, Finding
from ray_probe.doctor.devices import free_device
from ray_probe.errors import ParityError
from ray_probe.fitter.fitter import Fitter
from ray_probe.run.prepared import baseline_rule

TRIAL_PROMPTS, TRIAL_RESPONSES, TRIAL_TOKENS = 2, 2, 16
LEFT_OUT = "whether the loaded model can be sampled, scored and differentiated"


def not_loaded(case: Case) -> Finding:
    """The model is not loaded, and what that leaves open is named."""
    return Finding(f"not looked at: {LEFT_OUT}, and whether an adapter moves its logits", "add --load", looked=False)


def loaded(case: Case) -> Finding:
    """The model loads on this machine, and a few short responses go through all that a run does with them."""
    import torch

    assert case.prepared is not None
    config, memory = case.run, case.prepared.memory
    cuda = config.cluster.gpus_per_actor > 0 and torch.cuda.is_available()
    name, free = free_device(cuda)
    needed = memory.weights + memory.gradients
    if needed > free:
        what = f"not looked at: {LEFT_OUT}; weights and gradients take {size(needed)}, {name} here has {size(free)}"
        return Finding(what, "run doctor --load where there is room", looked=False)
    started = time.monotonic()
    return Finding(f"{_tried(case, _small(config), 'cuda' if cuda else 'cpu')} ({time.monotonic() - started:.0f} s)")


def _small(config: ProbeConfig) -> ProbeConfig:
    """The run's configuration with a low cap."""
    cap = min(TRIAL_TOKENS, config.generation.max_new_tokens)
    return config.model_copy(update={"generation": config.generation.model_copy(update={"max_new_tokens": cap})})


def _tried(case: Case, config: ProbeConfig, device: str) -> str:
    """Load the model and work off a small shard; returns what there is to say of it.

    Raises:
        InputError: what an actor would refuse when it loads the model.
        NonFiniteError: logits, entropies or the gradient hold NaN or infinity.
        ParityError: the scored policy is not the policy that sampled.
    """
    from ray_probe.rollout.builder import RolloutBuilder

    assert case.prepared is not None
    found, rule = case.prepared.checkpoint, baseline_rule(config)
    rollout = RolloutBuilder().load(config, found.directory, found.adapter, case.prepared.policy_id, device)
    first = case.prepared.plan.round(0)[0]
    shortest = tuple(sorted(first.prompts, key=lambda prompt: len(prompt.text))[:TRIAL_PROMPTS])
    shard = replace(first, prompts=shortest, responses_per_prompt=TRIAL_RESPONSES)
    rollout.begin("doctor")
    collected, fitter = rollout.collect(shard), Fitter(rule, case.prepared.policy_id)
    fitter.accept(collected.delivery)
    if problem := violation(collected.parity, config.model.dtype, config.generation.parity_tolerance):
        raise ParityError(f"{problem}; see whether the model's cache and its full forward pass agree")
    fit = fitter.close_round(shard.round, [shard.index])
    norm = rollout.accumulate(shard, fit).gradient_norm_sq ** 0.5
    frozen = f", {len(rollout.frozen)} frozen ones left out" if rollout.frozen else ""
    return (
        f"loaded on {device}, gradient of {len(rollout.layout.names)} parameters{frozen}; of {collected.tokens} tokens "
        f"the mean parity gap is {collected.parity.mean_gap:.1e} nats and the gradient's norm {norm:.3g}"
    )
