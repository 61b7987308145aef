"""Decoding drops ended rows where the cache can, and no token depends on it."""

from typing import Any

import numpy as np
import pytest
import torch
from support.models import EOS, tiny_model
from torch import Tensor
from transformers import cache_utils

from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.core.policy.logits import Buffer, SamplingRule
from ray_probe.model import decoding
from ray_probe.model.decoding import Decoder, Sampled
from ray_probe.model.forward import Forward
from ray_probe.model.trials import can_select

VOCABULARY, CAP, ROWS = 24, 20, 8
PROMPTS = [[3 + row] * (1 + row % 3) for row in range(ROWS)]
UNIFORMS_NT = np.random.default_rng(4).random((ROWS, CAP))


class Watched(Forward):
    """Remembers how many rows each pass through the model had."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.rows: list[int] = []

    def next_logits(self, ids_NP: Tensor, mask_NL: Tensor, cache: Any, buffer: Buffer) -> tuple[Tensor, Any]:
        self.rows.append(len(ids_NP))
        return super().next_logits(ids_NP, mask_NL, cache, buffer)


def sampled(batch_size: int = ROWS, features: tuple[str, ...] = ()) -> tuple[list[Sampled], list[int]]:
    forward = Watched(tiny_model("llama", VOCABULARY))
    decoder = Decoder(forward, SamplingRule(1.0, 1.0), CAP, (EOS, 5, 6), EOS, lambda tokens: None, features)
    return decoder.sample(PROMPTS, UNIFORMS_NT, batch_size), forward.rows


def test_rows_that_have_ended_are_passed_through_the_model_no_more(monkeypatch: pytest.MonkeyPatch):
    responses, rows = sampled()
    assert rows[0] == ROWS and rows[-1] < ROWS and rows == sorted(rows, reverse=True)
    assert sum(len(one.tokens) for one in responses) <= sum(rows) < ROWS * len(rows)
    monkeypatch.setattr(decoding, "COMPACT_BELOW", -1.0)
    waiting, all_rows = sampled()
    assert set(all_rows) == {ROWS}
    for one, other in zip(responses, waiting, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.log_q, other.log_q, rtol=0, atol=1e-5)


def test_features_belong_to_their_response_whatever_ended_before_it_or_was_beside_it():
    together, _ = sampled(features=DEFAULT_FEATURES)
    alone, _ = sampled(batch_size=1, features=DEFAULT_FEATURES)
    for one, other in zip(together, alone, strict=True):
        assert one.tokens == other.tokens and one.features_TD.shape == (len(one.tokens), len(DEFAULT_FEATURES))
        np.testing.assert_allclose(one.features_TD, other.features_TD, rtol=0, atol=1e-4)
    assert len({len(one.tokens) for one in together}) > 2


def test_a_response_ends_at_its_first_eos_and_has_a_log_q_a_token():
    responses, _ = sampled()
    for one in responses:
        ends = [place for place, token in enumerate(one.tokens) if token in (EOS, 5, 6)]
        assert ends == [len(one.tokens) - 1] or (not ends and len(one.tokens) == CAP)
        assert one.log_q.shape == (len(one.tokens),) and (one.log_q <= 0).all()


def test_only_a_cache_of_keys_and_values_has_rows_that_can_be_taken_out():
    def cache_of(*layers: Any) -> cache_utils.Cache:
        return cache_utils.Cache(layers=list(layers))

    plain = cache_utils.DynamicLayer()
    assert can_select(cache_of(plain, cache_utils.DynamicLayer()))
    assert not can_select(cache_of(plain, cache_utils.StaticLayer(max_cache_len=8)))
    if hasattr(cache_utils, "LinearAttentionAndFullAttentionLayer"):
        assert not can_select(cache_of(plain, cache_utils.LinearAttentionAndFullAttentionLayer()))
    assert not can_select(((torch.zeros(1), torch.zeros(1)),)), "a cache of another kind"
