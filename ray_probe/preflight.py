"""What can be known of a run before a cluster is touched: files checked, paths resolved, prompts measured, the plan."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ray_probe.chat import ChatTemplate, begins_with_two_bos, encode_prompts
from ray_probe.checkpoints import Checkpoint, inspect_checkpoint
from ray_probe.config import ProbeConfig
from ray_probe.context import context_length
from ray_probe.errors import ConfigError, PromptsError, bad_value
from ray_probe.memory import estimate
from ray_probe.plan import Plan
from ray_probe.prepared import CheckpointId, Prepared, PromptFacts
from ray_probe.prompts import PromptSet, absolute_source, load_prompts
from ray_probe.sequence_processor import refuse_eos_past

TOKENIZE_BATCH = 10_000


def prepare(
    config: ProbeConfig, created: datetime | None = None, checkpoint: Checkpoint | None = None
) -> Prepared:
    """Check files and sizes. Raises an InputError with one line for what is wrong.

    Args:
        config: the run's configuration.
        created: when the run was created, in its manifest; None: now. Chat templates that write a date write this one.
        checkpoint: what inspecting the checkpoint with its fingerprints gave; None: it is inspected here.
    """
    created = created or datetime.now(UTC).replace(microsecond=0)
    checkpoint = checkpoint or inspect_checkpoint(config.model)
    refuse_eos_past(checkpoint.rows, config.generation)
    data, batch = config.data, config.batch
    render = ChatTemplate(checkpoint.tokenizer, created) if data.chat_template else None
    prompts = load_prompts(data.prompts, data.field, render, config.model.local_files_only)
    usable, longest = _usable(config, checkpoint, prompts)
    plan = Plan(
        prompts.texts, usable, data.seed, batch.prompts_per_round, batch.responses_per_prompt,
        batch.shard_prompts, _rounds(config), data.repeat,
    )  # fmt: skip
    return Prepared(
        _absolute(config, checkpoint),
        CheckpointId(checkpoint.directory, checkpoint.fingerprint, checkpoint.adapter, checkpoint.adapter_fingerprint),
        PromptFacts(
            prompts.source, prompts.sha256, prompts.rendered_sha256, len(prompts), len(prompts) - len(usable), longest
        ),
        plan,
        _policy_id(config, checkpoint),
        created,
        estimate(config, checkpoint.directory, checkpoint.config, longest, checkpoint.adapter),
    )


def _rounds(config: ProbeConfig) -> int | None:
    """Rounds that the configuration allows; None where only time ends the run."""
    batch = config.batch
    allowed = [] if batch.rounds is None else [batch.rounds]
    if batch.max_sequences is not None:
        allowed.append(batch.max_sequences // (batch.prompts_per_round * batch.responses_per_prompt))
    return min(allowed, default=None)


def _absolute(config: ProbeConfig, checkpoint: Checkpoint) -> ProbeConfig:
    """Relative paths are resolved here, on the driver."""
    adapter = None if checkpoint.adapter is None else str(checkpoint.adapter)
    cache = config.model.cache_dir
    paths = {"path": str(checkpoint.directory), "adapter": adapter, "local_files_only": True}
    paths |= {"cache_dir": None if cache is None else str(Path(cache).resolve())}
    prompts = config.data.prompts
    source = {"prompts": absolute_source(prompts)} if isinstance(prompts, str) else {}
    output = {"dir": str(Path(config.output.dir).resolve())}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=paths),
            "data": config.data.model_copy(update=source),
            "output": config.output.model_copy(update=output),
        }
    )


def _policy_id(config: ProbeConfig, checkpoint: Checkpoint) -> str:
    """Of checkpoint, adapter and sampling policy; which prompts it is asked, and in what form, is another matter."""
    generation = config.generation
    parts = [
        checkpoint.fingerprint, checkpoint.adapter_fingerprint, config.model.dtype,
        generation.temperature, generation.top_p, generation.max_new_tokens, generation.eos_token_ids,
        config.estimator.x_estimator_mode,
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _usable(config: ProbeConfig, checkpoint: Checkpoint, prompts: PromptSet) -> tuple[tuple[int, ...], int]:
    """Indices of the prompts that fit, and the tokens of the longest.

    A longer one is an error, or is skipped where the config says so.
    """
    context = context_length(checkpoint.config)
    room = None if context is None else context - config.generation.max_new_tokens
    if room is not None and room < 1:
        remedy = f"it leaves no room for a prompt in the model's context of {context}"
        raise ConfigError(bad_value("generation.max_new_tokens", config.generation.max_new_tokens, remedy))
    limits = [limit for limit in (room, config.data.max_prompt_tokens) if limit is not None]
    usable, longest = [], 0
    for index, ids in enumerate(_encoded(checkpoint.tokenizer, prompts.texts, config.data.chat_template)):
        if not ids:
            raise PromptsError(f"{prompts.where(index)}: the prompt has no token; write at least one")
        if begins_with_two_bos(checkpoint.tokenizer, ids):
            raise PromptsError(f"{prompts.where(index)}: the prompt begins with two BOS tokens; write one at most")
        if limits and len(ids) > min(limits):
            if config.data.on_long == "skip":
                continue
            raise PromptsError(_too_long(prompts.where(index), len(ids), config, context))
        usable.append(index)
        longest = max(longest, len(ids))
    return tuple(usable), longest


def _too_long(where: str, length: int, config: ProbeConfig, context: int | None) -> str:
    allowed = config.data.max_prompt_tokens
    if allowed is not None and length > allowed:
        reason = f"data.max_prompt_tokens is {allowed}"
    else:
        reason = f"with generation.max_new_tokens {config.generation.max_new_tokens} it passes the context of {context}"
    return f"{where}: the prompt has {length} tokens, {reason}; shorten it, or set data.on_long to skip"


def _encoded(tokenizer: Any, texts: Sequence[str], chat: bool) -> Iterator[list[int]]:
    """Token ids prompt by prompt; never more than a batch of them in memory."""
    for start in range(0, len(texts), TOKENIZE_BATCH):
        yield from encode_prompts(tokenizer, texts[start : start + TOKENIZE_BATCH], chat)
