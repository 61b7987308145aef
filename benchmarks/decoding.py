"""Our sampling against `generate` of transformers, same policy, model and prompts.

Three more variants are timed. Ours with the features of each step; the bare forward passes, which bound the speed; and
rows that end after 16 to 64 tokens, with and without removing finished rows from the cache.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from benchmarks import language_model
from benchmarks.measure import interleaved, ratio, shown
from benchmarks.saving import save_for
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.token_statistics import TokenStatistics, sample_statistics
from ray_probe.model import decoding
from ray_probe.model.decoding import Decoder, Sampled
from ray_probe.model.forward import Forward

EOS = 0
SHORTEST_SHARE = 4  # ragged responses have 1/4 of the cap up to all of it
NEVER = -1.0
Case = dict[str, Any]


class Ended(StoppingCriteria):
    """Stops each row of `generate` after its own number of new tokens."""

    def __init__(self, lengths_N: Tensor, prompt_tokens: int) -> None:
        self._width_N = lengths_N + prompt_tokens

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """Return the rows that have ended."""
        return input_ids.shape[-1] >= self._width_N


class Problem:
    """A model, prompts and random numbers."""

    def __init__(self, size: language_model.Size, top_p: float, device: str) -> None:
        self.size, self.rule = size, SamplingRule(language_model.TEMPERATURE, top_p)
        self.model = language_model.model(size, device)
        self.forward = Forward(self.model)
        self.ids_NP = language_model.prompt_ids(size).to(device)
        numbers = np.random.default_rng(language_model.SEED)
        self.uniforms_NT = numbers.random((size.responses, size.new_tokens))
        least = size.new_tokens // SHORTEST_SHARE
        self.lengths_N = torch.from_numpy(numbers.integers(least, size.new_tokens + 1, size.responses)).to(device)

    def generate(self, ragged: bool = False) -> Tensor:
        """Sample with `generate`, without the extras of a generation_config."""
        nucleus = {} if self.rule.top_p >= 1.0 else {"top_p": self.rule.top_p}
        ends = StoppingCriteriaList([Ended(self.lengths_N, self.size.prompt_tokens)] if ragged else [])
        found: Tensor = self.model.generate(
            self.ids_NP, attention_mask=torch.ones_like(self.ids_NP), do_sample=True, top_k=0, pad_token_id=EOS,
            temperature=self.rule.temperature, max_new_tokens=self.size.new_tokens, stopping_criteria=ends, **nucleus,
        )  # fmt: skip
        return found

    def ours(self, features: tuple[str, ...] = ()) -> list[Sampled]:
        """Sample with our decoder."""
        return self._decoder((), features).sample(self.ids_NP.tolist(), self.uniforms_NT, self.size.responses)

    @torch.no_grad()
    def bare(self) -> None:
        """Run the forward passes alone, without choosing tokens."""
        ids_NP, cache = self.ids_NP, None
        for _ in range(self.size.new_tokens):
            output = self.model(ids_NP, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids_NP, cache = self.ids_NP[:, :1], output.past_key_values

    def ragged(self, compact_below: float) -> list[Sampled]:
        """Sample rows that end after `lengths_N`: a random number of 0 stands for EOS."""
        uniforms_NT = self.uniforms_NT.copy()
        uniforms_NT[np.arange(self.size.responses), self.lengths_N.cpu().numpy() - 1] = 0.0
        before, decoding.COMPACT_BELOW = decoding.COMPACT_BELOW, compact_below
        decoding.sample_statistics = _ending
        try:
            sampled = self._decoder((EOS,)).sample(self.ids_NP.tolist(), uniforms_NT, self.size.responses)
        finally:
            decoding.COMPACT_BELOW, decoding.sample_statistics = before, sample_statistics
        assert [len(one.tokens) for one in sampled] == self.lengths_N.tolist()
        return sampled

    def _decoder(self, eos_ids: tuple[int, ...], features: tuple[str, ...] = ()) -> Decoder:
        return Decoder(self.forward, self.rule, self.size.new_tokens, eos_ids, EOS, lambda tokens: None, features)


def _ending(logits_NV: Tensor, uniform_N: Tensor, *rest: Any) -> tuple[Tensor, TokenStatistics]:
    """Do as `sample_statistics`, but return EOS exactly where the number is 0."""
    token_N, statistics = sample_statistics(logits_NV, uniform_N, *rest)
    return torch.where(uniform_N == 0.0, EOS, token_N.clamp(min=EOS + 1)), statistics


def timed(problem: Problem, options: Any) -> Case:
    """Time full-length responses."""
    variants: dict[str, Callable[[], object]] = {
        "generate": problem.generate,
        "ours": problem.ours,
        "with features": partial(problem.ours, DEFAULT_FEATURES),
        "forward": problem.bare,
    }  # fmt: skip
    seconds = interleaved(variants, options.rounds, options.device)
    speed = {name: ratio(seconds["generate"], values) for name, values in seconds.items()}
    over = {name: ratio(values, seconds["forward"]) for name, values in seconds.items()}
    print(f"  top_p={problem.rule.top_p:g}: time of generate over each, each over the bare forward passes, tokens/s")
    for name, values in seconds.items():
        rate = problem.size.tokens / min(values)
        print(f"    {name:14s} x{shown(speed[name], 2):20s} {shown(over[name], 2):20s} {rate:8.0f}")
    return {"top_p": problem.rule.top_p, "generate_over": speed, "over_forward": over, "seconds": seconds}


def timed_ragged(problem: Problem, options: Any) -> Case:
    """Time responses of a quarter of the cap up to all of it."""
    variants: dict[str, Callable[[], object]] = {
        "generate": lambda: problem.generate(ragged=True),
        "waiting": lambda: problem.ragged(NEVER),
        "compacted": lambda: problem.ragged(decoding.COMPACT_BELOW),
    }
    seconds = interleaved(variants, options.rounds, options.device)
    gain = ratio(seconds["waiting"], seconds["compacted"])
    speed = {name: ratio(seconds["generate"], values) for name, values in seconds.items()}
    lengths = problem.lengths_N.tolist()
    print(
        f"  lengths {min(lengths)} to {max(lengths)}, top_p=1: compacted over waiting x{shown(gain, 2)}, "
        f"over generate x{shown(speed['compacted'], 2)}"
    )
    return {"lengths": lengths, "waiting_over_compacted": gain, "generate_over": speed, "seconds": seconds}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, save."""
    options = language_model.options_of(__doc__, rounds=5, responses=16)
    chosen = options.parse_args(arguments or [])
    torch.set_num_threads(chosen.threads)
    size = language_model.size_of(chosen)
    print(f"  {size}")
    cases = [timed(Problem(size, top_p, chosen.device), chosen) for top_p in chosen.top_p]
    ragged = timed_ragged(Problem(size, 1.0, chosen.device), chosen)
    save_for("decoding", chosen, {"size": vars(size), "seed": language_model.SEED, "cases": cases, "ragged": ragged})


if __name__ == "__main__":
    main(sys.argv[1:])
