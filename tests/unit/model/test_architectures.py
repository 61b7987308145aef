"""Every causal language model of transformers is measured right, or refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import CONTEXT, ROWS, text_architectures, tiny
from support.models import character_tokenizer, save_checkpoint
from support.reference import Gaps, worst_gaps

from ray_probe.checkpoints.memory_forecast import estimate
from ray_probe.checkpoints.model_kinds import check_kind
from ray_probe.config.loading import config_from_dict
from ray_probe.config.schema import GenerationSettings
from ray_probe.errors import CheckpointError, ConfigError, ParityError
from ray_probe.model.context_length import context_length, limit_of
from ray_probe.sequence_processor import SequenceProcessor

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PROMPTS = ["a", "bcd", "ABCDEFGHIJ", "hello0world9xyz", "q7"]
ENDS = (0, 3, 9, 17, 33, 41)  # several, so that rows end at different steps
EXACT = 2e-4  # nats; float32
NO_CACHE = "need a decoder-only model with a key-value cache"
REFUSED = {
    **dict.fromkeys(("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm"), NO_CACHE),
    **dict.fromkeys(("openai-gpt", "recurrent_gemma", "reformer", "xlm", "xlnet"), NO_CACHE),
    **dict.fromkeys(
        ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl"),
        "need a model whose positions count from 0",
    ),
    **dict.fromkeys(("cpmant", "prophetnet"), "need a causal language model"),
    **dict.fromkeys(("moshi", "zamba2"), "generation.parity_tolerance: got 0.001 nats; steps of"),
}
"""What transformers 5.23 has that cannot be measured, and why."""
ALMOST = {"nemotron_h": 0.1}
"""Those whose cache has a gap that the parity gate allows: the largest gap of log q when sampled, nats."""
SOME = ("gemma4_text", "deepseek_v3", "deepseek_v4", "minimax", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_next")
"""One of each kind: shapes that differ by layer, latent keys, compressed caches, states beside the cache, no cache."""


def policy(model: Any, **generation: Any) -> SequenceProcessor:
    settings = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 20, "eos_token_ids": ENDS} | generation
    return SequenceProcessor(model, character_tokenizer(CHARACTERS), GenerationSettings(**settings))


def measured(name: str) -> Gaps | str:
    """Return the gaps to plain transformers, or the refusal by config or trial."""
    model = tiny(name)
    try:
        check_kind(Path("here"), model.config)
        return worst_gaps(policy(model), PROMPTS)
    except (CheckpointError, ParityError) as error:
        assert "\n" not in str(error)
        return str(error)


def check(name: str) -> None:
    found = measured(name)
    if name in REFUSED:
        assert isinstance(found, str) and REFUSED[name] in found, found
    else:
        assert isinstance(found, Gaps), found
        assert max(found.scored, found.entropy) < EXACT and found.sampled < ALMOST.get(name, EXACT), found


@pytest.mark.parametrize("name", sorted(set(SOME) & set(text_architectures())))
def test_one_of_each_kind_agrees_with_plain_transformers_or_is_refused(name: str):
    check(name)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", text_architectures())
def test_every_architecture_agrees_with_plain_transformers_or_is_refused(name: str):
    check(name)


@pytest.mark.slow
def test_memory_can_be_forecast_for_every_architecture_that_has_a_cache(tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path / "c", tiny("llama"), CHARACTERS)  # its headers stand for any model's
    unknown = {}
    for name in text_architectures():
        config = config_from_dict({"model": {"path": str(checkpoint)}, "data": {"prompts": ["a"]}})
        demand = estimate(config, checkpoint, tiny(name).config, 16)
        if demand.unknown:
            unknown[name] = demand.unknown
    assert set(unknown) <= {name for name, why in REFUSED.items() if why is NO_CACHE}, unknown


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_table_of_positions_ends_before_a_context_that_is_accepted():
    failed = {}
    for name in text_architectures():
        model = tiny(name)
        if context_length(model.config) != CONTEXT or not goes_beyond(model.config):
            continue
        try:
            with torch.no_grad():
                model(input_ids=torch.arange(CONTEXT + 16)[None] % ROWS, use_cache=False)
        except (IndexError, RuntimeError) as error:
            failed[name] = str(error)
    assert not failed


def goes_beyond(config: Any) -> bool:
    try:
        return limit_of(config, 2 * CONTEXT) == 2 * CONTEXT
    except ConfigError:
        return False
