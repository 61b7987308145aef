"""Small models as policies, with prompts, responses and scores to compare."""

from functools import cache
from typing import Any

from ray_probe.model.sequences import BatchedSequences, LogprobResults
from ray_probe.sequence_processor import SequenceProcessor
from support.models import processor, tiny_model

CHARACTERS = "abcdefghijklmnopqrstuv"
VOCABULARY = len(CHARACTERS) + 2  # EOS and padding
PROMPTS = ["a", "bcdefghijklmnopqrstuvabcd", "efg"]
SEEDS = [[(b, g) for g in range(3)] for b in range(len(PROMPTS))]
PAIRS = [(b, g) for b in range(3) for g in range(3)]
WHOLE_VOCABULARY = {"top_p": 1.0, "max_new_tokens": 16}


@cache
def policy(architecture: str) -> SequenceProcessor:
    """Return a policy on the whole vocabulary."""
    return processor(tiny_model(architecture, VOCABULARY), CHARACTERS, **WHOLE_VOCABULARY)


@cache
def sampled(architecture: str) -> BatchedSequences:
    """Return three responses to each of `PROMPTS`."""
    return policy(architecture).generate(PROMPTS, 3, SEEDS)


def scored(processor: SequenceProcessor, sequences: BatchedSequences, **options: Any) -> LogprobResults:
    """Score sequences with entropies and features."""
    return processor.teacher_force_logprobs(sequences, compute_rb=True, return_baseline_features=True, **options)


def responses(sequences: BatchedSequences) -> list[list[int]]:
    """Return the token ids of all responses, prompt by prompt."""
    groups, group = sequences.shape
    return [sequences.tokens(b, g)[1].tolist() for b in range(groups) for g in range(group)]


def many(policy: SequenceProcessor, prompt: str, count: int) -> list[list[int]]:
    """Sample `count` responses to one prompt."""
    return responses(policy.generate([prompt], count, [[(11, g) for g in range(count)]]))
