"""Check the estimator against exact enumeration, in seconds and in one process.

On a policy with a few dozen responses, the probability-weighted mean of the estimator over all responses must equal
autograd's gradient of the enumerated J (docs/specification.md, "Invariants"). The test uses the processor, components,
records, fit and gradient sum of a run, and `ray_probe.doctor.enumeration`, which shares no code with them.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ray_probe.config import GenerationSettings
from ray_probe.core.estimator.baselines import BaselineRule, ShardBaseline
from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.core.estimator.modes import MODES, Mode
from ray_probe.core.estimator.record_checks import check
from ray_probe.core.estimator.records import Record, position_bins, total
from ray_probe.core.estimator.targets import Estimator
from ray_probe.core.policy.features import DEFAULT_FEATURES
from ray_probe.doctor.enumeration import EOS, enumerate_policy
from ray_probe.gradient.shard_sum import GradientSum
from ray_probe.model.sequences import BatchedSequences, pack_sequences
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.shard_record import record_of_results
from ray_probe.sequence_processor import SequenceProcessor

TOLERANCE = 1e-9
SAMPLED = 16
PROMPT = "ab"
CHECKS = ("sampling", "rb_residual", "naive", "leave_one_out")
FITTED: tuple[Mode, ...] = ("constant", "residual_mu", "regression")

Response = tuple[int, ...]
Baselines = Iterable[tuple[float, ShardBaseline]]


class Toy(NamedTuple):
    """Settings of a policy that can be enumerated."""

    vocabulary: int
    cap: int
    top_p: float
    temperature: float


SINGLES = Toy(4, 3, 0.9, 1.3)  # 19 responses
PAIRS = Toy(3, 3, 0.93, 1.3)  # 7 responses, 49 pairs


class _OutOfTime(Exception):
    """The time limit of the self-test has passed."""


@dataclass(frozen=True)
class SelfTestResult:
    """The outcome of the self-test.

    Attributes:
        errors: largest relative error of each check: `sampling` (probability of sampled responses), `rb_residual` and
            `naive` (gradient with a fixed baseline, over its modes), `leave_one_out` (gradient over all pairs of
            responses).
        unfinished: checks that did not finish in time.
        seconds: duration.
        tolerance: the largest error that passes.
    """

    errors: Mapping[str, float]
    unfinished: tuple[str, ...]
    seconds: float
    tolerance: float = TOLERANCE

    @property
    def failed(self) -> tuple[str, ...]:
        """Checks whose error is NaN or exceeds the tolerance."""
        return tuple(name for name, error in self.errors.items() if not error <= self.tolerance)


def self_test(seconds: float = 10.0) -> SelfTestResult:
    """Check the installed estimator.

    Args:
        seconds: time limit; later checks are reported as unfinished.

    Raises:
        ProbeError: the estimator refuses its own numbers.
    """
    started = time.monotonic()
    errors: dict[str, float] = {}
    with _one_thread(), contextlib.suppress(_OutOfTime):
        policy = _Policy(SINGLES, started + seconds)
        errors["sampling"] = _sampling_error(policy)
        errors["rb_residual"] = _fixed_error(policy, "rb_residual")
        errors["naive"] = _fixed_error(policy, "naive")
        errors["leave_one_out"] = _pairs_error(_Policy(PAIRS, started + seconds))
    return SelfTestResult(errors, CHECKS[len(errors) :], time.monotonic() - started)


def _sampling_error(policy: "_Policy") -> float:
    """Return the largest relative error of sampled probabilities."""
    sequences = policy.processor.generate([PROMPT], SAMPLED, [[(0, g) for g in range(SAMPLED)]])
    assert sequences.sample_logprobs is not None
    gaps = []
    for g, log_q_T in enumerate(sequences.sample_logprobs[0]):
        exact = policy.probabilities.get(tuple(sequences.tokens(0, g)[1].tolist()), 0.0)
        sampled = float(np.exp(log_q_T.sum()))
        gaps.append(abs(sampled - exact) / sampled)
    return _largest(gaps)


def _fixed_error(policy: "_Policy", estimator: Estimator) -> float:
    """Return the largest error of the gradient over modes of a fixed baseline."""
    numbers = np.random.default_rng(3)
    beta_D, means_B = numbers.normal(size=len(DEFAULT_FEATURES)), numbers.normal(size=position_bins(policy.cap))
    baselines = [ShardBaseline(mode, 0.7, means_B, beta_D, policy.cap, True) for mode in MODES]
    return _largest([policy.error(estimator, partial(_alone, baseline)) for baseline in baselines])


def _pairs_error(policy: "_Policy") -> float:
    """Return the largest error of two one-response shards, each fitted on the other."""
    return _largest([policy.error("rb_residual", policy.served_by_the_other(mode)) for mode in FITTED])


def _alone(baseline: ShardBaseline, response: Response) -> Baselines:
    """Return the same baseline for every response."""
    return [(1.0, baseline)]


def _largest(errors: Sequence[float]) -> float:
    """Return the largest error; NaN counts as larger than any number."""
    return float(np.max(errors))


class _Policy:
    """A policy whose responses can be enumerated, with the parts of a rollout."""

    def __init__(self, toy: Toy, deadline: float) -> None:
        vocabulary, cap, top_p, temperature = toy
        self.cap = cap
        self.deadline = deadline
        model = _tiny_model(vocabulary)
        settings = GenerationSettings(temperature=temperature, top_p=top_p, max_new_tokens=cap)
        self.processor = SequenceProcessor(model, _tiny_tokenizer(vocabulary), settings)
        self.gradient = GradientSum(model, "all")
        self.prompt = self.processor.encode(PROMPT)
        exact = enumerate_policy(model, self.prompt, cap, temperature, top_p)
        self.probabilities = dict(zip(exact.responses, exact.probabilities, strict=True))
        self.exact_gradient = exact.gradient

    def error(self, estimator: Estimator, baselines_of: Callable[[Response], Baselines]) -> float:
        """Return the relative error of the estimator's mean gradient.

        Args:
            estimator: `rb_residual` or `naive`.
            baselines_of: returns the possible baselines of a response, with their probabilities.
        """
        components = ProbeComponents(self.processor, estimator)
        mean = torch.zeros_like(self.exact_gradient)
        for response, probability in self.probabilities.items():
            for share, baseline in baselines_of(response):
                mean += probability * share * self._gradient_of(components, response, baseline)
        return float((mean - self.exact_gradient).norm() / self.exact_gradient.norm())

    def served_by_the_other(self, mode: Mode) -> Callable[[Response], Baselines]:
        """Return a response's baselines in rounds with every other response."""
        rule = BaselineRule(mode, "leave_one_out", 1e-3, 0.9, DEFAULT_FEATURES, self.cap)
        empty = PublishedFit.empty(rule, "self-test")
        records = {response: self._record_of(response, rule) for response in self.probabilities}

        def baselines(response: Response) -> Iterator[tuple[float, ShardBaseline]]:
            own = records[response]
            for other, probability in self.probabilities.items():
                yield probability, empty.after_round(total([own, records[other]], rule.shape)).for_shard(own)

        return baselines

    def _record_of(self, response: Response, rule: BaselineRule) -> Record:
        """Return the record of a shard with only this response, as the fitter receives it."""
        results = self.processor.teacher_force_logprobs(
            self._sequences(response), compute_rb=True, return_baseline_features=True
        )
        made = record_of_results(results, np.array([0]), "rb_residual", self.cap)
        arrived = Record.unpack(made.pack())
        check(arrived, rule.shape)
        return arrived

    def _gradient_of(self, components: ProbeComponents, response: Response, baseline: ShardBaseline) -> torch.Tensor:
        if time.monotonic() > self.deadline:
            raise _OutOfTime
        self.gradient.reset()
        components.accumulate_sum_X(self._sequences(response), baseline)
        self.gradient.add_shard()
        return torch.from_numpy(self.gradient.bucket(0, self.gradient.layout.size))

    def _sequences(self, response: Response) -> BatchedSequences:
        return pack_sequences([self.prompt], [[response]])


def _tiny_model(vocabulary: int) -> GPT2LMHeadModel:
    """Build a GPT-2 of a thousand parameters in float64."""
    # GPT-2, because its LayerNorm computes in float64 and Llama's norm does not.
    with torch.random.fork_rng(devices=()):
        model = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocabulary, n_positions=16, n_embd=8, n_layer=1, n_head=2, eos_token_id=EOS,
                bos_token_id=None,
            )
        )  # fmt: skip
    own = torch.Generator().manual_seed({3: 3, 4: 8}[vocabulary])  # seeds that give nuclei of several tokens
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0.0, 0.6, generator=own)
    return model.double()


def _tiny_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Build a tokenizer of one token a letter; id 0 ends a response."""
    words = ["<eos>", *"abc"[: vocabulary - 1]]
    letters = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="<eos>")


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Use one thread: small tensors gain nothing from more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(limits=1):
            yield
    finally:
        torch.set_num_threads(before)
