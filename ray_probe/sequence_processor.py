"""A transformers causal language model as a policy that samples and scores.

Only the EOS ids of the checkpoint's generation_config are used (docs/specification.md, "Sampling policy").

Shape suffixes: N rows (responses), T response width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ray_probe.checkpoints.tokenizer.eos import resolve_eos, token_text
from ray_probe.checkpoints.tokenizer.eos_sources import sources_of_model
from ray_probe.config import GenerationSettings
from ray_probe.core.arrays import Array
from ray_probe.core.columns import LOGIT_COLUMNS
from ray_probe.core.policy.fused_head import fused_token_statistics, score_and_keep
from ray_probe.core.policy.logits import SamplingRule
from ray_probe.core.policy.token_scores import ScoredTokens
from ray_probe.core.policy.token_statistics import TokenStatistics, token_statistics
from ray_probe.data.tokenization import encode_prompts
from ray_probe.errors import ConfigError, bad_value
from ray_probe.model.context_length import limit_of, rope_switch
from ray_probe.model.decoding import Decoder
from ray_probe.model.feature_columns import FeatureColumns
from ray_probe.model.forward import Forward, refuse_non_finite
from ray_probe.model.micro_batches import ScoredMicroBatch, entropies_of, grouped, plan_micro_batches, results_of
from ray_probe.model.prompt_checks import PromptChecks
from ray_probe.model.sequences import BatchedSequences, LogprobResults, TokenRow, pack_sequences
from ray_probe.model.trials import check_cache_gap

Seed = int | Sequence[int]


def response_uniforms(seed: Seed, cap: int) -> Array:
    """Return the random numbers of one response [cap], float64 in [0, 1)."""
    entropy = [seed] if isinstance(seed, int) else list(seed)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).random(cap)


class SequenceProcessor:
    """Samples responses of a model, and scores them under the same policy.

    Args:
        model: a transformers causal language model; set to eval mode.
        tokenizer: its tokenizer.
        generation: the policy and the batch sizes.
        features: names of the baseline's columns that scoring can compute; position_mean is left to the fit.
        on_progress: called with the number of tokens done, often enough to tell slow from stuck.
        chat: prompts come from a chat template, and hold their special tokens.
        eos_ids: ids that end a response; None: `generation.eos_token_ids`, or else the ids of model and tokenizer.
        context_length: positions of a prompt with its response, at most; None: as the model's config says.

    Raises:
        ConfigError: `generation.eos_token_ids` has an id that the model lacks, the model lacks such a context, or a
            feature is unknown.
        CheckpointError: model and tokenizer name no id that ends a response, or one that the model lacks, or the model
            cannot be measured (see `ray_probe.model.trials`).
        ParityError: the error of the model's cache alone exceeds the tolerance of the parity gate.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        generation: GenerationSettings,
        features: Sequence[str] = LOGIT_COLUMNS,
        on_progress: Callable[[int], None] = lambda tokens: None,
        chat: bool = False,
        eos_ids: Sequence[int] | None = None,
        context_length: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.generation = generation
        self.columns = FeatureColumns.of(features)
        self.rule = SamplingRule(generation.temperature, generation.top_p)
        self.rows: int = model.get_input_embeddings().weight.shape[0]
        if eos_ids is None:
            sources = () if generation.eos_token_ids is not None else sources_of_model(model, tokenizer)
            eos_ids = resolve_eos(generation.eos_token_ids, sources, self.rows, token_text(tokenizer)).ids
        self.eos_ids = tuple(eos_ids)
        self.on_progress = on_progress
        self.chat = chat
        self._checks = PromptChecks(
            tokenizer, self.rows, self.eos_ids, chat, limit_of(model.config, context_length),
            rope_switch(model.config), generation.max_new_tokens,
        )  # fmt: skip
        self.forward = Forward(model)
        check_cache_gap(self.forward, generation.parity_tolerance)

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return self.forward.device

    def encode(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, as `encode_prompts` gives them."""
        return encode_prompts(self.tokenizer, [prompt], self.chat)[0]

    def ended(self, response: Sequence[int]) -> bool:
        """Return whether the response ended at an EOS token, not at the cap."""
        return int(response[-1]) in self.eos_ids

    def generate(
        self,
        prompts: Sequence[str],
        responses_per_prompt: int,
        seeds: Sequence[Sequence[Seed]],
        decode: bool = False,
        return_baseline_features: bool = False,
    ) -> BatchedSequences:
        """Sample responses under the policy.

        Args:
            prompts: B prompts.
            responses_per_prompt: G.
            seeds: [B][G], an int or a tuple of ints for each response. A response depends on its own seed, not on the
                batch that it is sampled in.
            decode: fill `responses_text`.
            return_baseline_features: fill `sample_features` with the features of each sampled token, from the model's
                step by step passes.

        Raises:
            ConfigError: the number of seeds differs from the number of responses.
            PromptsError: a prompt cannot be measured (see `PromptChecks`).
            NonFiniteError: the model's logits hold NaN or infinity.
        """
        if [len(group) for group in seeds] != [responses_per_prompt] * len(prompts):
            shape = f"need one a response, {len(prompts)} x {responses_per_prompt}"
            raise ConfigError(bad_value("seeds", [len(group) for group in seeds], shape))
        encoded = encode_prompts(self.tokenizer, prompts, self.chat)
        self._checks.check(prompts, encoded)
        rows = [encoded[b] for b in range(len(prompts)) for _ in range(responses_per_prompt)]
        cap = self.generation.max_new_tokens
        uniforms_NT = np.stack([response_uniforms(seed, cap) for group in seeds for seed in group])
        names = self.columns.of_logits if return_baseline_features else ()
        decoder = Decoder(self.forward, self.rule, cap, self.eos_ids, self._pad_id(), self.on_progress, names)
        sampled = grouped(decoder.sample(rows, uniforms_NT, self.generation.gen_batch_size), responses_per_prompt)
        tokens, log_q = ([[getattr(one, name) for one in group] for group in sampled] for name in ("tokens", "log_q"))
        batch = pack_sequences(encoded, tokens, log_q, self._pad_id())
        if return_baseline_features:
            columns = iter(self.columns.from_entropies([[one.entropy for one in group] for group in sampled]))
            joined = [[self.columns.join(one.features_TD, next(columns)) for one in group] for group in sampled]
            batch = replace(batch, sample_features=joined)
        if decode:
            read = partial(self.tokenizer.decode, skip_special_tokens=True)
            batch = replace(batch, responses_text=[[read(response) for response in group] for group in tokens])
        return batch

    def teacher_force_logprobs(
        self,
        sequences: BatchedSequences,
        with_grad: bool = False,
        tf_batch_size: int | None = None,
        compute_rb: bool = False,
        return_baseline_features: bool = False,
    ) -> LogprobResults:
        """Score responses in micro-batches of at most `tf_batch_size` responses.

        Features are detached and change no gradient. The siblings of a response are the others of its prompt, [b]. With
        `with_grad`, every micro-batch keeps its graph as long as the results live; to bound memory, take the parts of
        `score_parts` one by one.
        """
        parts = list(self.score_parts(sequences, with_grad, return_baseline_features, tf_batch_size))
        results = results_of(parts, sequences.shape[1], with_grad, compute_rb)
        if not return_baseline_features:
            return results
        entropies = entropies_of(parts, sequences.shape[1])
        return self.columns.complete(results, self.columns.from_entropies(entropies))

    def entropies(self, sequences: BatchedSequences) -> list[list[Array]]:
        """Return H of each token of all responses [b][g], float64 arrays [T], nats."""
        parts = self.score_parts(sequences, with_grad=False, with_features=False)
        return entropies_of(list(parts), sequences.shape[1])

    def score_parts(
        self,
        sequences: BatchedSequences,
        with_grad: bool,
        with_features: bool,
        tf_batch_size: int | None = None,
        accumulate_into_grad: bool = False,
        keep_bytes: int = 0,
        cached: Sequence[ScoredTokens | None] = (),
    ) -> Iterator[ScoredMicroBatch]:
        """Score responses lazily, micro-batch by micro-batch.

        Args:
            sequences: the responses.
            with_grad: keep the graph of each micro-batch as long as it lives.
            with_features: compute the baseline's columns that are made from logits.
            tf_batch_size: responses in a micro-batch, at most; None: as configured.
            accumulate_into_grad: `backward` adds the gradient of the head's weight directly to its `.grad`, which saves
                a table of its size but hides it from `torch.autograd.grad`.
            keep_bytes: without graph, fill `ScoredMicroBatch.cached` of the first micro-batches that together take
                less memory.
            cached: `ScoredMicroBatch.cached` of each micro-batch, from an earlier call; empty: nothing is cached.

        Yields:
            One micro-batch at a time; every response is in exactly one.

        Raises:
            NonFiniteError: the model's logits hold NaN or infinity.
            PromptsError: rows cross a length at which the model's rotary frequencies change for a whole batch.
        """
        groups, group = sequences.shape
        lengths = zip(sequences.prompt_lens, sequences.gen_lens, strict=True)
        self._checks.check_lengths(sequences.prompt_lens, [prompt + max(responses) for prompt, responses in lengths])
        rows = [sequences.tokens(b, g) for b in range(groups) for g in range(group)]
        features = self.columns.of_logits if with_features else ()
        assert not (with_grad and keep_bytes), "only a pass without graph is cached"
        micro_batches = list(self._micro_batches(sequences, tf_batch_size))
        for (places, positions), known in zip(micro_batches, cached or [None] * len(micro_batches), strict=True):
            batch = [rows[place] for place in places]
            with torch.set_grad_enabled(with_grad):
                statistics, kept = self._score(batch, features, accumulate_into_grad, keep_bytes > 0, known)
            keep_bytes = 0 if kept is None else max(0, keep_bytes - kept.bytes)
            yield ScoredMicroBatch(places, statistics, positions, kept if keep_bytes else None)

    def positions(self, sequences: BatchedSequences) -> int:
        """Return the positions that scoring takes, padding included."""
        return sum(positions for _, positions in self._micro_batches(sequences, None))

    def _micro_batches(self, sequences: BatchedSequences, size: int | None) -> Iterator[tuple[list[int], int]]:
        """Yield the places of responses scored together, and the positions they take."""
        prompts, (_, group) = sequences.prompt_lens, sequences.shape
        lengths = [prompts[place // group] + n for place, n in enumerate(n for row in sequences.gen_lens for n in row)]
        most = size or self.generation.tf_batch_size
        for places in plan_micro_batches(lengths, most, self.generation.tf_batch_tokens):
            yield sorted(places), len(places) * lengths[places[0]]

    def _pad_id(self) -> int:
        """Return any id with an embedding row; the mask marks the padding."""
        pad = self.tokenizer.pad_token_id
        # Tokenizers often have the pad token -1, or one without a row because the embeddings were not resized.
        return int(pad) if pad is not None and 0 <= pad < self.rows else 0

    def _score(
        self, rows: list[TokenRow], features: Sequence[str], accumulate_into_grad: bool, keep: bool,
        cached: ScoredTokens | None,
    ) -> tuple[list[TokenStatistics], ScoredTokens | None]:  # fmt: skip
        """Return the statistics of each row's response from one forward pass."""
        device, cap, pad_id = self.device, self.generation.max_new_tokens, self._pad_id()
        lengths = [len(response) for _, response in rows]
        position_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
        tokens_T = torch.cat([response for _, response in rows]).to(device)
        assert cached is None or len(cached.log_q_T) == len(tokens_T), "the cache is of another micro-batch"
        kept: ScoredTokens | None = None
        if self.forward.head is None:
            logits_TV, rows_T = self.forward.logits(rows, pad_id), torch.arange(len(tokens_T), device=device)
            flat = token_statistics(logits_TV, rows_T, tokens_T, position_T, self.rule, cap, features)
        else:
            hidden_TD, head = self.forward.hidden(rows, pad_id), self.forward.head.matrices(accumulate_into_grad)
            asked = hidden_TD, head, tokens_T, position_T, self.rule, cap, features
            if keep:
                flat, kept = score_and_keep(*asked)
            else:
                flat = fused_token_statistics(*asked, cached)
        refuse_non_finite(flat.log_q_T)
        self.on_progress(len(tokens_T))
        columns = [flat.log_q_T, flat.entropy_T, flat.outside_T]
        split = [torch.split(column, lengths) for column in columns]
        feats = [None] * len(lengths) if flat.features_TD is None else torch.split(flat.features_TD, lengths)
        return [TokenStatistics(*parts) for parts in zip(*split, feats, strict=True)], kept
