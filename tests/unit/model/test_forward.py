"""A model's first position and its padding on the left are tried before use."""

from typing import Any

import numpy as np
import pytest
import torch
from support.models import ARCHITECTURES, tiny_model
from transformers import AutoModelForCausalLM, BartConfig, RobertaConfig

from ray_probe.core.policy.logits import SamplingRule
from ray_probe.errors import CheckpointError
from ray_probe.model.decoding import Decoder, Sampled, in_batches
from ray_probe.model.forward import Forward

VOCABULARY, CAP = 24, 6
PROMPTS = [[3 + row] * (1 + row % 3) for row in range(6)]
UNIFORMS_NT = np.random.default_rng(4).random((len(PROMPTS), CAP))
COMMON = {"vocab_size": VOCABULARY, "pad_token_id": 1, "bos_token_id": None, "eos_token_id": 0, "is_decoder": True}


def loud(model: Any) -> Any:
    """Weights so large that positions show."""
    own = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.5, generator=own)
    return model.eval()


def roberta() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return loud(AutoModelForCausalLM.from_config(RobertaConfig(**COMMON, **sizes, max_position_embeddings=32)))


def bart(positions: int = 32) -> Any:
    sizes = {"d_model": 16, "decoder_layers": 2, "decoder_attention_heads": 2, "decoder_ffn_dim": 32}
    config = BartConfig(**COMMON, **sizes, is_encoder_decoder=False, max_position_embeddings=positions)
    return loud(AutoModelForCausalLM.from_config(config))


def sampled(forward: Forward, batch_size: int) -> list[Sampled]:
    decoder = Decoder(forward, SamplingRule(1.0, 1.0), CAP, (), 0, lambda tokens: None)
    return decoder.sample(PROMPTS, UNIFORMS_NT, batch_size)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_usual_architectures_take_prompts_of_different_length_at_once(architecture: str, dtype: torch.dtype):
    forward = Forward(tiny_model(architecture, VOCABULARY).to(dtype))
    assert forward.takes_padding and forward.head is not None


def test_a_model_whose_positions_do_not_count_from_0_is_refused():
    with pytest.raises(
        CheckpointError, match=r"model\.path: got 'RobertaForCausalLM'.*positions count from 0"
    ) as caught:
        Forward(roberta())
    assert "\n" not in str(caught.value)


def test_where_padding_changes_what_a_model_says_prompts_of_one_length_are_sampled_at_once():
    forward = Forward(bart())
    assert not forward.takes_padding
    alone, together = sampled(forward, 1), sampled(forward, len(PROMPTS))
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.log_q, other.log_q, rtol=0, atol=1e-5)
    forward.takes_padding = True
    padded = sampled(forward, len(PROMPTS))
    assert max(float(np.abs(a.log_q - b.log_q).max()) for a, b in zip(padded, alone, strict=True)) > 0.01


def test_batches_hold_each_prompt_once_shortest_first():
    lengths = [3, 1, 2, 1, 3, 1, 2]
    assert list(in_batches(lengths, 2, mixed=True)) == [[1, 3], [5, 2], [6, 0], [4]]
    assert list(in_batches(lengths, 2, mixed=False)) == [[1, 3], [5], [2, 6], [0, 4]]
    assert list(in_batches([], 2, mixed=False)) == []


def test_a_model_that_sees_few_positions_is_tried_with_no_more():
    model = tiny_model("gpt2", VOCABULARY)
    model.transformer.wpe = torch.nn.Embedding.from_pretrained(model.transformer.wpe.weight[:3])
    model.config.n_positions = 3
    assert Forward(model).takes_padding
    for positions in (1, 2, 8):
        assert not Forward(bart(positions)).takes_padding
