"""Prepares a run before a cluster is used: checks files, makes the plan."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from typing import Any

from ray_probe.checkpoints.inspection import Checkpoint, inspect_checkpoint
from ray_probe.checkpoints.memory_forecast import GradientUse, MemoryDemand, estimate
from ray_probe.checkpoints.tokenizer.eos import Eos
from ray_probe.config import ProbeConfig
from ray_probe.data.chat_template import ChatTemplate
from ray_probe.data.prompts import PromptSet, absolute_source, load_prompts
from ray_probe.data.tokenization import appended_eos, begins_with_two_bos, encode_prompts
from ray_probe.errors import ConfigError, PromptsError, bad_value
from ray_probe.model.context_length import limit_of, rope_switch
from ray_probe.run.comparison.same_tokens import check_same_architecture, check_same_tokens, inspect_against
from ray_probe.run.preparation.plan import Plan
from ray_probe.run.preparation.prepared import CheckpointId, PreparedRun, PromptFacts
from ray_probe.run.stopping import FIRST_PROMPTS

TOKENIZE_BATCH = 10_000


def prepare(
    config: ProbeConfig, created: datetime | None = None, checkpoint: Checkpoint | None = None,
    against: Checkpoint | None = None,
) -> PreparedRun:  # fmt: skip
    """Return the run of a configuration, checked.

    Args:
        config: the run's configuration.
        created: when the run was created, for the manifest and for chat templates that write a date; None: now.
        checkpoint: the inspected checkpoint; None: inspect it here.
        against: of a comparison, the inspected checkpoint A; None: inspect it here.

    Raises:
        InputError: a file, a setting or a prompt cannot be used.
    """
    created = created or datetime.now(UTC).replace(microsecond=0)
    checkpoint = checkpoint or inspect_checkpoint(config.model)
    against = against or inspect_against(config)
    eos = checkpoint.eos(config.generation.eos_token_ids)
    data, batch = config.data, config.batch
    render = ChatTemplate(checkpoint.tokenizer, created) if data.chat_template else None
    prompts = load_prompts(data.prompts, data.field, render, config.model.local_files_only, data.id_field)
    if against is not None:
        check_same_architecture(config, against, checkpoint)
        check_same_tokens(config, against, checkpoint, prompts, created)
    usable, facts = _usable(config, checkpoint, prompts, eos)
    if against is not None and _usable(config, against, prompts, eos)[0] != usable:
        remedy = "fewer prompts fit its context than that of model.path; lower data.max_prompt_tokens"
        raise ConfigError(bad_value("compare.against", config.compare.against, remedy))
    plan = Plan(
        prompts.texts, usable, data.seed, batch.prompts_per_round, batch.responses_per_prompt,
        batch.shard_prompts, _rounds(config), data.repeat,
    )  # fmt: skip
    if batch.target_error is not None and len(usable) < FIRST_PROMPTS:
        remedy = f"batch.target_error needs at least {FIRST_PROMPTS} prompts; add prompts, or leave it out"
        raise PromptsError(bad_value("data.prompts", len(usable), remedy))
    policies = [checkpoint] if against is None else [checkpoint, against]
    return PreparedRun(
        _absolute(config, checkpoint, against),
        _id_of(checkpoint),
        facts,
        plan,
        _policy_id(config, policies, eos),
        created,
        memory_of(config, policies, facts.longest_tokens),
        eos,
        None if against is None else _id_of(against),
    )


def memory_of(config: ProbeConfig, policies: Sequence[Checkpoint], longest_tokens: int) -> MemoryDemand:
    """Return what an actor needs of memory.

    Args:
        config: the run's configuration.
        policies: its checkpoint; of a comparison B and A, whose place a midpoint takes in turns.
        longest_tokens: of its prompts.

    Raises:
        CheckpointError: the headers cannot be read.
    """
    wanted: list[tuple[Checkpoint, GradientUse]]
    wanted = [(one, "summed" if len(policies) == 1 else "none") for one in policies]
    demands = [estimate(config, one.directory, one.config, longest_tokens, one.adapter, use) for one, use in wanted]
    demand = reduce(MemoryDemand.beside, demands)
    if not config.compare.parts:
        return demand
    first = policies[0]
    midpoint = estimate(config, first.directory, first.config, longest_tokens, first.adapter, "multiplied")
    return replace(demand.beside(replace(midpoint, weights=0)), with_midpoint=True, in_turns=None)


def _id_of(checkpoint: Checkpoint) -> CheckpointId:
    return CheckpointId(
        checkpoint.directory, checkpoint.fingerprint, checkpoint.adapter, checkpoint.adapter_fingerprint,
        checkpoint.policy_tokenizer.tokenizer_from, checkpoint.policy_tokenizer.template_from,
    )  # fmt: skip


def _rounds(config: ProbeConfig) -> int | None:
    """Return the rounds that the configuration allows; None where time ends the run."""
    batch = config.batch
    allowed = [] if batch.rounds is None else [batch.rounds]
    if batch.max_sequences is not None:
        allowed.append(batch.max_sequences // (batch.prompts_per_round * batch.responses_per_prompt))
    return min(allowed, default=None)


def _absolute(config: ProbeConfig, checkpoint: Checkpoint, against: Checkpoint | None) -> ProbeConfig:
    """Return the configuration with absolute paths, resolved on the driver."""
    cache = config.model.cache_dir
    paths = {"path": str(checkpoint.directory), "adapter": _text(checkpoint.adapter), "local_files_only": True}
    paths |= {"cache_dir": None if cache is None else str(Path(cache).resolve())}
    other = {} if against is None else {"against": str(against.directory), "adapter": _text(against.adapter)}
    prompts = config.data.prompts
    source = {"prompts": absolute_source(prompts)} if isinstance(prompts, str) else {}
    output = {"dir": str(Path(config.output.dir).resolve())}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=paths),
            "compare": config.compare.model_copy(update=other),
            "data": config.data.model_copy(update=source),
            "output": config.output.model_copy(update=output),
            "metrics": config.metrics.resolved(),
            "notify": config.notify.resolved(),
        }
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _policy_id(config: ProbeConfig, policies: Sequence[Checkpoint], eos: Eos) -> str:
    """Return the name of checkpoints, adapters and sampling policy."""
    generation = config.generation
    parts = [
        *(part for one in policies for part in (one.fingerprint, one.adapter_fingerprint)), config.model.dtype,
        generation.temperature, generation.top_p, generation.max_new_tokens, eos.ids,
        config.estimator.x_estimator_mode,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _usable(
    config: ProbeConfig, checkpoint: Checkpoint, prompts: PromptSet, eos: Eos
) -> tuple[tuple[int, ...], PromptFacts]:
    """Return the indices of the prompts that fit, and facts about the prompts.

    Skips a prompt that does not fit, or raises PromptsError.
    """
    context, cap = limit_of(checkpoint.config, config.data.context_length), config.generation.max_new_tokens
    room = None if context is None else context - cap
    if room is not None and room < 1:
        remedy = f"it leaves no room for a prompt in the context of {context}, lower it, or raise data.context_length"
        raise ConfigError(bad_value("generation.max_new_tokens", cap, remedy))
    limits = [limit for limit in (room, config.data.max_prompt_tokens) if limit is not None]
    tokenizer, chat = checkpoint.tokenizer, config.data.chat_template
    usable, lengths, after_eos = [], [], 0
    for index, ids in enumerate(_encoded(tokenizer, prompts.texts, chat)):
        if not ids:
            raise PromptsError(f"{prompts.where(index)}: the prompt has no token; write at least one")
        if begins_with_two_bos(tokenizer, ids):
            raise PromptsError(f"{prompts.where(index)}: the prompt begins with two BOS tokens; write one at most")
        if (appended := appended_eos(tokenizer, prompts.texts[index], ids, eos.ids, chat)) is not None:
            raise PromptsError(f"{prompts.where(index)}: {appended}")
        if limits and len(ids) > min(limits):
            if config.data.on_long == "skip":
                continue
            raise PromptsError(_too_long(prompts.where(index), len(ids), config, context))
        usable.append(index)
        lengths.append(len(ids))
        after_eos += ids[-1] in eos.ids and ids[-1] != tokenizer.bos_token_id  # a BOS token also begins a text
    switch = rope_switch(checkpoint.config)
    if switch is not None and lengths and (problem := switch.problem(min(lengths), max(lengths) + cap)):
        raise ConfigError(bad_value("generation.max_new_tokens", cap, problem))
    return tuple(usable), PromptFacts(
        source=prompts.source, sha256=prompts.sha256, rendered_sha256=prompts.rendered_sha256, count=len(prompts),
        skipped_as_too_long=len(prompts) - len(usable), longest_tokens=max(lengths, default=0),
        ending_with_eos=after_eos,
    )  # fmt: skip


def _too_long(where: str, length: int, config: ProbeConfig, context: int | None) -> str:
    allowed = config.data.max_prompt_tokens
    if allowed is not None and length > allowed:
        reason = f"data.max_prompt_tokens is {allowed}"
    else:
        reason = f"with generation.max_new_tokens {config.generation.max_new_tokens} it passes the context of {context}"
    remedy = "shorten it, or set data.on_long to skip"
    if allowed is None or length <= allowed:
        remedy = "shorten it, set data.on_long to skip, or data.context_length where the model sees more"
    return f"{where}: the prompt has {length} tokens, {reason}; {remedy}"


def _encoded(tokenizer: Any, texts: Sequence[str], chat: bool) -> Iterator[list[int]]:
    """Yield the token ids of each prompt, with at most a batch of them in memory."""
    for start in range(0, len(texts), TOKENIZE_BATCH):
        yield from encode_prompts(tokenizer, texts[start : start + TOKENIZE_BATCH], chat)
