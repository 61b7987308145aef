"""A transformers causal language model as a policy: sample responses, and score them under the same policy.

Of the checkpoint's generation_config only what ends a response is taken (spec section 3).

Shape suffixes: N rows (responses), T response width.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from ray_probe.chat import begins_with_two_bos, encode_prompts
from ray_probe.config import GenerationSettings
from ray_probe.context import context_length
from ray_probe.core.features import DEFAULT_FEATURES
from ray_probe.core.fused_head import Found, find, fused_token_statistics
from ray_probe.core.policy import SamplingRule
from ray_probe.core.token_statistics import TokenStatistics, token_statistics
from ray_probe.decoding import Decoder
from ray_probe.errors import CheckpointError, ConfigError, PromptsError, bad_value
from ray_probe.forward import Forward, refuse_non_finite
from ray_probe.micro_batches import plan_micro_batches
from ray_probe.scored_parts import ScoredPart, grouped, results_of
from ray_probe.sequences import Array, BatchedSequences, LogprobResults, TokenRow, pack_sequences

Seed = int | Sequence[int]


def resolve_eos_ids(explicit: Sequence[int] | None, *sources: Any) -> tuple[int, ...]:
    """Ids that end a response: the explicit ones, else the union of `eos_token_id` of the sources, ascending.

    Raises CheckpointError when none is named anywhere (then only the user can say what ends a response), or when one
    is no integer.
    """
    if explicit is not None:
        return tuple(explicit)
    found: set[int] = set()
    for source in sources:
        value = getattr(source, "eos_token_id", None)
        ids = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in ids):
            raise CheckpointError(
                bad_value("eos_token_id", value, "need integers in the checkpoint, or set generation.eos_token_ids")
            )
        found.update(ids)
    if not found:
        raise CheckpointError(
            "generation.eos_token_ids: got null, and the checkpoint names no EOS token; "
            "list the ids that end a response, or [] to end at the cap alone"
        )
    return tuple(sorted(found))


def refuse_eos_past(rows: int, generation: GenerationSettings) -> None:
    """Refuse configured EOS ids that have no row in the model's embeddings. Raises ConfigError."""
    if any(token >= rows for token in generation.eos_token_ids or ()):
        remedy = f"need ids below the {rows} tokens of the model"
        raise ConfigError(bad_value("generation.eos_token_ids", list(generation.eos_token_ids or ()), remedy))


def response_uniforms(seed: Seed, cap: int) -> Array:
    """The random numbers of one response [cap], float64 in [0, 1): they depend on its seed alone."""
    entropy = [seed] if isinstance(seed, int) else list(seed)
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy))).random(cap)


class SequenceProcessor:
    """Samples responses of a model and scores them, both under the one sampling policy.

    Args:
        model: a transformers causal language model; it is put in eval mode.
        tokenizer: its tokenizer.
        generation: the policy and the batch sizes.
        features: names of the baseline features that `teacher_force_logprobs` computes when asked to.
        on_progress: called with the number of tokens done, often enough to tell slow from stuck.
        chat: prompts are what a chat template made, and hold their special tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        generation: GenerationSettings,
        features: Sequence[str] = DEFAULT_FEATURES,
        on_progress: Callable[[int], None] = lambda tokens: None,
        chat: bool = False,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.generation = generation
        self.features = tuple(features)
        self.rule = SamplingRule(generation.temperature, generation.top_p)
        sources = (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer)
        self.eos_ids = resolve_eos_ids(generation.eos_token_ids, *sources)
        self.on_progress = on_progress
        self.chat = chat
        refuse_eos_past(model.get_input_embeddings().weight.shape[0], generation)
        self.forward = Forward(model)

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return self.forward.device

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as `encode_prompts` gives them."""
        return encode_prompts(self.tokenizer, [prompt], self.chat)[0]

    def ended(self, response: Sequence[int]) -> bool:
        """Whether the response ended at an EOS token rather than at the cap."""
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
            seeds: [B][G], each an int or a tuple of ints that belongs to the response: the tokens do not depend on
                the batch that the response was sampled in.
            decode: fill `responses_text`.
            return_baseline_features: fill `sample_features`: what scoring the responses would give, in the numbers of
                the model's step by step passes.

        Raises:
            ConfigError: there is not one seed a response.
            PromptsError: a prompt has no token, begins with two BOS tokens, or passes the context with the cap.
            NonFiniteError: the model's logits hold NaN or infinity.
        """
        if [len(group) for group in seeds] != [responses_per_prompt] * len(prompts):
            shape = f"need one a response, {len(prompts)} x {responses_per_prompt}"
            raise ConfigError(bad_value("seeds", [len(group) for group in seeds], shape))
        encoded = encode_prompts(self.tokenizer, prompts, self.chat)
        self._check_prompts(encoded)
        rows = [encoded[b] for b in range(len(prompts)) for _ in range(responses_per_prompt)]
        cap = self.generation.max_new_tokens
        uniforms_NT = np.stack([response_uniforms(seed, cap) for group in seeds for seed in group])
        names = self.features if return_baseline_features else ()
        decoder = Decoder(self.forward, self.rule, cap, self.eos_ids, self._pad_id(), self.on_progress, names)
        sampled = grouped(decoder.sample(rows, uniforms_NT, self.generation.gen_batch_size), responses_per_prompt)
        tokens, log_q = ([[getattr(one, name) for one in group] for group in sampled] for name in ("tokens", "log_q"))
        batch = pack_sequences(encoded, tokens, log_q, self._pad_id())
        if return_baseline_features:
            batch = replace(batch, sample_features=[[one.features_TD for one in group] for group in sampled])
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
        """Score responses under the policy, in micro-batches of at most `tf_batch_size` responses.

        Features are detached, and asking for them changes no gradient. With `with_grad` every micro-batch keeps its
        graph as long as the results live: take `score_parts` one by one to bound memory.
        """
        parts = self.score_parts(sequences, with_grad, return_baseline_features, tf_batch_size)
        return results_of(list(parts), sequences.shape[1], with_grad, compute_rb)

    def score_parts(
        self,
        sequences: BatchedSequences,
        with_grad: bool,
        with_features: bool,
        tf_batch_size: int | None = None,
        lend: bool = False,
        keep_bytes: int = 0,
        found: Sequence[Found | None] = (),
    ) -> Iterator[ScoredPart]:
        """Score responses micro-batch by micro-batch, each when it is asked for; every response is in one of them.

        Args:
            sequences: the responses.
            with_grad: keep the graph of each micro-batch as long as it lives.
            with_features: compute the baseline features.
            tf_batch_size: responses in a micro-batch, at most; None: as configured.
            lend: `backward` adds the gradient of the head's weight straight to its `.grad`, which spares a table of its
                size; `torch.autograd.grad` does not see it then.
            keep_bytes: without graph, fill `ScoredPart.found` of the first micro-batches, as long as together they
                take less memory.
            found: of each micro-batch what such a call before this one has filled in; none: everything is done anew.

        Raises:
            NonFiniteError: the model's logits hold NaN or infinity.
        """
        groups, group = sequences.shape
        rows = [sequences.tokens(b, g) for b in range(groups) for g in range(group)]
        features = self.features if with_features else ()
        assert not (with_grad and keep_bytes), "it is kept of a pass without graph"
        micro_batches = list(self._micro_batches(sequences, tf_batch_size))
        for (places, positions), known in zip(micro_batches, found or [None] * len(micro_batches), strict=True):
            batch = [rows[place] for place in places]
            with torch.set_grad_enabled(with_grad):
                statistics, kept = self._score(batch, features, lend, keep_bytes > 0, known)
            keep_bytes = 0 if kept is None else max(0, keep_bytes - kept.bytes)
            yield ScoredPart(places, statistics, positions, kept if keep_bytes else None)

    def positions(self, sequences: BatchedSequences) -> int:
        """Positions that scoring takes, padding included."""
        return sum(positions for _, positions in self._micro_batches(sequences, None))

    def _micro_batches(self, sequences: BatchedSequences, size: int | None) -> Iterator[tuple[list[int], int]]:
        """Places of the responses that are scored together, ascending, and the positions that they take."""
        prompts, (_, group) = sequences.prompt_lens, sequences.shape
        lengths = [prompts[place // group] + n for place, n in enumerate(n for row in sequences.gen_lens for n in row)]
        most = size or self.generation.tf_batch_size
        for places in plan_micro_batches(lengths, most, self.generation.tf_batch_tokens):
            yield sorted(places), len(places) * lengths[places[0]]

    def _pad_id(self) -> int:
        """Any id that has an embedding: what is padding is said by the mask."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def _check_prompts(self, encoded: Iterable[Sequence[int]]) -> None:
        limit = context_length(self.model.config)
        for index, ids in enumerate(encoded):
            if not ids:
                raise PromptsError(f"prompt {index}: has no token; give the model at least one")
            if begins_with_two_bos(self.tokenizer, ids):
                raise PromptsError(f"prompt {index}: begins with two BOS tokens; write one at most")
            if limit is not None and len(ids) + self.generation.max_new_tokens > limit:
                raise PromptsError(
                    f"prompt {index}: {len(ids)} tokens plus generation.max_new_tokens "
                    f"{self.generation.max_new_tokens} pass the model's context of {limit}; shorten one of them"
                )

    def _score(
        self, rows: list[TokenRow], features: Sequence[str], lend: bool, keep: bool, found: Found | None
    ) -> tuple[list[TokenStatistics], Found | None]:
        """Statistics of each row's response, from one forward pass; see `score_parts`."""
        device, cap, pad_id = self.device, self.generation.max_new_tokens, self._pad_id()
        lengths = [len(response) for _, response in rows]
        position_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
        tokens_T = torch.cat([response for _, response in rows]).to(device)
        assert found is None or len(found.scores.log_q_T) == len(tokens_T), "of another micro-batch"
        kept: Found | None = None
        if self.forward.head is None:
            logits_TV, rows_T = self.forward.logits(rows, pad_id), torch.arange(len(tokens_T), device=device)
            flat = token_statistics(logits_TV, rows_T, tokens_T, position_T, self.rule, cap, features)
        else:
            hidden_TD, head = self.forward.hidden(rows, pad_id), self.forward.head.matrices(lend)
            asked = hidden_TD, head, tokens_T, position_T, self.rule, cap, features
            if keep:
                flat, kept = find(*asked)
            else:
                flat = fused_token_statistics(*asked, found)
        refuse_non_finite(flat.log_q_T)
        self.on_progress(len(tokens_T))
        columns = [flat.log_q_T, flat.entropy_T, flat.outside_T]
        split = [torch.split(column, lengths) for column in columns]
        feats = [None] * len(lengths) if flat.features_TD is None else torch.split(flat.features_TD, lengths)
        return [TokenStatistics(*parts) for parts in zip(*split, feats, strict=True)], kept
