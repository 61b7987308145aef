"""Context length with rotary scaling, and where scaling couples rows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import ROWS, tiny, tiny_config
from support.models import character_tokenizer, probe_config, save_checkpoint
from support.reference import worst_gaps

from ray_probe.config import GenerationSettings
from ray_probe.errors import ConfigError, PromptsError
from ray_probe.model.context_length import context_length, limit_of, rope_switch
from ray_probe.model.sequences import pack_sequences
from ray_probe.run.preparation.prepare import prepare
from ray_probe.sequence_processor import SequenceProcessor

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
SHORT, LONG = ["ab", "cdefgh"], ["abcdefghijklmnopqrstuvwx", "ABCDEFGHIJKLMNOPQRSTUVWXYZ"]
ORIGINAL = 20
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0] * 4, "long_factor": [1.0, 3.0, 6.0, 9.0],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def phi3(**changes: Any) -> Any:
    lengths = {"max_position_embeddings": 80, "original_max_position_embeddings": ORIGINAL, "rope_scaling": None}
    return tiny("phi3", rope_parameters=LONGROPE | changes, **lengths)


def policy(model: Any, context: int | None = None, **generation: Any) -> SequenceProcessor:
    settings = GenerationSettings(**{"top_p": 0.9, "max_new_tokens": 8, "eos_token_ids": ()} | generation)
    return SequenceProcessor(model, character_tokenizer(CHARACTERS), settings, context_length=context)


def exact(model: Any, prompts: list[str], **generation: Any) -> bool:
    """Compare batched sampling and scoring with plain transformers, row by row."""
    gaps = worst_gaps(policy(model, **generation), prompts)
    return max(gaps.scored, gaps.entropy, gaps.sampled) < 1e-4


# The context


@pytest.mark.parametrize(
    ("name", "own", "rope", "expected"),
    [
        # As published: Qwen3's recipe, Llama 3.2, gpt-oss, Phi-3-mini-128k; InternLM2's dynamic scaling.
        ("qwen3", 40960, YARN | {"original_max_position_embeddings": 32768}, 131072),
        ("llama", 131072, LLAMA3 | {"factor": 32.0, "original_max_position_embeddings": 8192}, 131072),
        ("llama", 8192, LLAMA3 | {"factor": 8.0, "original_max_position_embeddings": 8192}, 65536),
        ("llama", 131072, YARN | {"factor": 32.0, "original_max_position_embeddings": 4096}, 131072),
        ("llama", 32768, YARN | {"original_max_position_embeddings": None}, 131072),
        ("phi3", 131072, LONGROPE | {"factor": None, "original_max_position_embeddings": 4096}, 131072),
        ("phi3", 4096, LONGROPE | {"factor": 32.0, "original_max_position_embeddings": 4096}, 131072),
        ("llama", 32768, DYNAMIC | {"factor": 2.0}, 65536),
        ("llama", 131072, {"rope_type": "linear", "factor": 8.0}, 131072),
        ("llama", 256, {"rope_type": "default"}, 256),
    ],
)
def test_the_factor_of_a_rotary_scaling_counts_where_the_config_has_the_length_before_it(
    name: str, own: int, rope: dict[str, Any], expected: int
):
    rope = {key: value for key, value in rope.items() if value is not None}
    lengths = {"max_position_embeddings": own}
    if name == "phi3":
        lengths["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    assert context_length(tiny_config(name, **lengths, rope_parameters={"rope_theta": 1e4} | rope)) == expected


def test_scaling_of_one_type_of_layer_counts():
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": YARN}
    config = tiny_config("gemma3_text", rope_parameters=rope, max_position_embeddings=32)
    assert context_length(config) == 96 and rope_switch(config) is None


def test_a_context_that_is_asked_for_wins_over_the_models_where_its_positions_are_rotary():
    llama, gpt2 = tiny_config("llama"), tiny_config("gpt2")
    assert [limit_of(llama, asked) for asked in (None, 10, 1000)] == [256, 10, 1000]
    assert [limit_of(gpt2, asked) for asked in (None, 10, 256)] == [256, 10, 256]
    assert limit_of(tiny_config("bloom"), 1000) == 1000
    with pytest.raises(ConfigError, match=r"^data\.context_length: got 257; .*gpt2.* is 256; lower it$"):
        limit_of(gpt2, 257)


def test_a_run_past_the_length_before_yarn_has_the_numbers_of_plain_transformers():
    model = tiny("qwen3", max_position_embeddings=32, rope_parameters=YARN)
    assert exact(model, SHORT, max_new_tokens=60)
    with pytest.raises(PromptsError, match=r"pass the model's context of 96"):
        policy(model, max_new_tokens=95).generate(SHORT, 1, [[0], [1]])


def test_the_library_keeps_to_the_context_that_is_asked_for():
    model = tiny("llama", max_position_embeddings=32)
    policy(model, context=64, max_new_tokens=58).generate(SHORT, 1, [[0], [1]])
    with pytest.raises(PromptsError, match=r"context of 64"):
        policy(model, context=64, max_new_tokens=59).generate(SHORT, 1, [[0], [1]])


# Scaling that depends on the longest row of a batch


def logits_beside(model: Any, row: int, other: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the last logits of a row alone, and beside another one."""
    ids = torch.arange(2 * max(row, other)).reshape(2, -1) % ROWS
    with torch.no_grad():
        alone = model(input_ids=ids[:1, :row]).logits[0, row - 1]
        beside = model(input_ids=ids[:, : max(row, other)]).logits[0, row - 1]
    return alone, beside


@pytest.mark.parametrize(
    ("name", "settings", "switch"),
    [
        ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": ORIGINAL}, ORIGINAL),
        ("llama", {"rope_parameters": LONGROPE}, ORIGINAL),
        ("llama", {"rope_parameters": LONGROPE | {"short_factor": LONGROPE["long_factor"]}}, None),
        ("phimoe", {"rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.5}}, ORIGINAL),
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 24}, 24),
        ("llama", {"rope_parameters": YARN, "max_position_embeddings": 24}, None),
        ("llama", {"rope_parameters": LLAMA3 | {"factor": 4.0, "original_max_position_embeddings": 24}}, None),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, None),
        ("llama", {}, None),
    ],
)
def test_a_switch_is_where_a_row_has_other_numbers_beside_a_longer_one(
    name: str, settings: dict[str, Any], switch: int | None
):
    model = tiny(name, **settings)
    found = rope_switch(model.config)
    assert (None if found is None else found.tokens) == switch
    for other, same in ((switch or 24, True), ((switch or 24) + 1, switch is None)):
        alone, beside = logits_beside(model, 6, other)
        assert torch.allclose(alone, beside, atol=1e-4) is same


def test_rows_on_one_side_of_a_switch_have_the_numbers_of_plain_transformers():
    model = phi3()
    assert exact(model, SHORT, max_new_tokens=ORIGINAL - 6)
    assert exact(model, LONG, max_new_tokens=16)  # all beyond: the long factors from the first token on
    equal = phi3(short_factor=LONGROPE["long_factor"])
    assert exact(equal, [*SHORT, *LONG], max_new_tokens=24)


@pytest.mark.parametrize(("prompts", "cap"), [(SHORT, ORIGINAL - 5), ([*SHORT, *LONG], 8), (["a" * ORIGINAL], 1)])
def test_rows_on_both_sides_of_a_switch_are_refused_before_anything_is_sampled(prompts: list[str], cap: int):
    processor = policy(phi3(), max_new_tokens=cap)
    message = rf"^generation\.max_new_tokens: got {cap}; .* both sides of 20 tokens, where longrope scaling .*; keep"
    with pytest.raises(PromptsError, match=message) as caught:
        processor.generate(prompts, 1, [[0]] * len(prompts))
    assert "\n" not in str(caught.value)


def test_rows_on_both_sides_of_a_switch_are_not_scored_together():
    processor = policy(phi3())
    short, long, crossing = ([1] * 4, [2] * 4), ([1] * 24, [2] * 4), ([1] * 16, [2] * 8)
    for rows in ([short], [long]):
        processor.teacher_force_logprobs(pack_sequences([p for p, _ in rows], [[r] for _, r in rows]))
    for rows in ([short, long], [crossing]):
        with pytest.raises(PromptsError, match="longrope"):
            processor.teacher_force_logprobs(pack_sequences([p for p, _ in rows], [[r] for _, r in rows]))


def test_beyond_its_length_dynamic_scaling_has_no_side_on_which_rows_are_independent():
    model = tiny("llama", rope_parameters=DYNAMIC, max_position_embeddings=24)
    alone, beside = logits_beside(model, 30, 40)
    assert not torch.allclose(alone, beside, atol=1e-2)
    with pytest.raises(PromptsError, match="dynamic NTK"):
        policy(model).generate(LONG, 1, [[0], [1]])
    assert exact(model, SHORT, max_new_tokens=18)


# A run


@pytest.mark.parametrize(
    ("data", "cap", "error"),
    [
        ({"prompts": SHORT}, 14, None),
        ({"prompts": SHORT}, 15, r"^generation\.max_new_tokens: got 15; .*rows of up to 21 .*longrope"),
        ({"prompts": LONG}, 14, None),
        ({"prompts": [*SHORT, *LONG]}, 14, "longrope"),
        ({"prompts": [*SHORT, *LONG], "max_prompt_tokens": 6, "on_long": "skip"}, 14, None),
        ({"prompts": LONG, "context_length": 40}, 15, "it passes the context of 40"),
        ({"prompts": LONG, "context_length": 41}, 15, None),
        ({"prompts": LONG, "context_length": 500}, 400, None),
        ({"prompts": LONG}, 80, "no room for a prompt in the context of 80"),
    ],
)
def test_a_run_is_refused_in_one_line_before_a_cluster_is_touched(
    tmp_path: Path, data: dict[str, Any], cap: int, error: str | None
):
    checkpoint = save_checkpoint(tmp_path / "c", phi3(), CHARACTERS)
    generation = {"max_new_tokens": cap, "eos_token_ids": []}
    batch = {"prompts_per_round": 2, "shard_prompts": 1}
    config = probe_config(checkpoint, data=data, generation=generation, batch=batch)
    if error is None:
        assert prepare(config).config.data.context_length == data.get("context_length")
        return
    with pytest.raises((ConfigError, PromptsError), match=error) as caught:
        prepare(config)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
