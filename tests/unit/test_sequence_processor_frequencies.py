"""Sampled frequencies are those of the settings, not of generation_config.json."""

import json
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from support.enumeration import oracle_policy
from support.models import EOS, save_checkpoint, tiny_gpt2
from support.policies import many, scored

from ray_probe.checkpoints.load import load_model
from ray_probe.checkpoints.tokenizer.load import load_tokenizer
from ray_probe.config import GenerationSettings
from ray_probe.sequence_processor import SequenceProcessor

TINY = "abcdefg"
DECLARED = {"temperature": 1.3, "top_p": 0.9, "max_new_tokens": 6, "gen_batch_size": 2000}
OTHER_WISHES = {
    "top_k": 5, "repetition_penalty": 1.3, "temperature": 0.1, "do_sample": True, "max_new_tokens": 3,
    "eos_token_id": [EOS, 3], "suppress_tokens": [1], "bad_words_ids": [[2]], "forced_eos_token_id": 0,
    "min_new_tokens": 2, "no_repeat_ngram_size": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def opinionated(tmp_path_factory: pytest.TempPathFactory) -> SequenceProcessor:
    """Load a policy whose generation_config.json asks for another policy."""
    directory = save_checkpoint(tmp_path_factory.mktemp("opinionated"), tiny_gpt2(8, torch.float32, seed=2), TINY)
    (directory / "generation_config.json").write_text(json.dumps(OTHER_WISHES))
    model = load_model(directory, "float32")
    assert model.generation_config.top_k == 5
    return SequenceProcessor(model, load_tokenizer(directory), GenerationSettings(**DECLARED))


@pytest.fixture(scope="module")
def thousands(opinionated: SequenceProcessor) -> list[list[int]]:
    return many(opinionated, "ab", 6000)


def exact_prefixes(model: Any, temperature: float) -> dict[tuple[int, ...], float]:
    """Return probabilities of the first two tokens, or of the first if it is the last."""
    prompt, result = [1, 2], {}
    with torch.no_grad():
        first = oracle_policy(model(torch.tensor([prompt])).logits[0, -1], temperature, 0.9)[0].exp()
        for y in range(8):
            if y in (EOS, 3):
                result[(y,)] = first[y].item()
                continue
            logits = model(torch.tensor([[*prompt, y]])).logits[0, -1]
            second = oracle_policy(logits, temperature, 0.9)[0].exp() * first[y]
            result |= {(y, z): second[z].item() for z in range(8)}
    return {prefix: share for prefix, share in result.items() if share > 0}


def p_value(exact: dict[tuple[int, ...], float], found: list[list[int]]) -> float:
    """Return the p-value of prefixes; those expected fewer than 5 times are pooled."""
    cells = {prefix: share for prefix, share in exact.items() if share * len(found) >= 5}
    counts = dict.fromkeys(cells, 0)
    for response in found:
        prefix = tuple(response[:1]) if tuple(response[:1]) in exact else tuple(response[:2])
        if prefix in counts:
            counts[prefix] += 1
    observed = [*counts.values(), len(found) - sum(counts.values())]
    expected = [*cells.values(), 1 - sum(cells.values())]
    if expected[-1] * len(found) < 1e-6:
        if observed.pop():
            return 0.0
        expected.pop()
    return float(chisquare(observed, np.array(expected) / sum(expected) * len(found)).pvalue)


def test_nothing_of_generation_config_but_its_eos_ids_reaches_the_sampler(opinionated, thousands):
    exact = exact_prefixes(opinionated.model, 1.3)
    assert (
        p_value({(y,): sum(p for k, p in exact.items() if k[0] == y) for y in {k[0] for k in exact}}, thousands) > 1e-3
    )
    assert p_value(exact, thousands) > 1e-3
    assert {tuple(y[:2]) for y in thousands} <= {k[:2] for k in exact}
    assert opinionated.eos_ids == (EOS, 3)
    assert {y[-1] for y in thousands if len(y) < 6} == {EOS, 3}
    assert max(len(y) for y in thousands) == 6


def test_control_the_frequencies_would_show_another_temperature(opinionated, thousands):
    assert p_value(exact_prefixes(opinionated.model, 1.0), thousands) < 1e-6


def test_sampled_entropy_agrees_with_surprisal_on_average(opinionated):
    sequences = opinionated.generate(["ab"], 2000, [[(5, g) for g in range(2000)]])
    results = scored(opinionated, sequences, tf_batch_size=2000)
    gaps = [s.sum() - h.sum() for s, h in zip(results.entropies[0], results.rb_entropies[0], strict=True)]
    assert abs(np.mean(gaps)) < 4 * np.std(gaps) / np.sqrt(len(gaps))
