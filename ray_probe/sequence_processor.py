"""A transformers causal language model as a policy: sample responses, and score them under the same policy.

Sampling is a loop of our own on the model's key-value cache: `generate` of transformers would merge the checkpoint's
generation_config (top_k, penalties, forced tokens, a length) into the policy. Only what ends a response is taken from
there (spec section 3).

Shape suffixes: N rows (responses) of one forward, P prompt width, T response width, V vocabulary.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ray_probe.chat import begins_with_two_bos, encode_prompts
from ray_probe.config import GenerationSettings
from ray_probe.core.features import DEFAULT_FEATURES
from ray_probe.core.policy import SamplingRule, sample_rows
from ray_probe.core.token_statistics import TokenStatistics, token_statistics
from ray_probe.errors import CheckpointError, ConfigError, NonFiniteError, PromptsError, bad_value
from ray_probe.sequences import Array, BatchedSequences, LogprobResults, TokenRow, pack_sequences

Seed = int | Sequence[int]
CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length")


def context_length(model_config: Any) -> int | None:
    """Positions that the model can see, or None when its config names no limit."""
    text_config = model_config.get_text_config()
    for name in CONTEXT_FIELDS:
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


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
        rows = model.get_input_embeddings().weight.shape[0]
        if any(token >= rows for token in generation.eos_token_ids or ()):
            remedy = f"need ids below the {rows} tokens of the model"
            raise ConfigError(bad_value("generation.eos_token_ids", list(self.eos_ids), remedy))
        accepted = inspect.signature(model.forward).parameters
        if "past_key_values" not in accepted:
            raise self._no_cache()
        self._takes_positions = "position_ids" in accepted
        self._keeps_logits = "logits_to_keep" in accepted

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def encode(self, prompt: str) -> list[int]:
        """Token ids of a prompt, as `encode_prompts` gives them."""
        return encode_prompts(self.tokenizer, [prompt], self.chat)[0]

    def ended(self, response: Sequence[int]) -> bool:
        """Whether the response ended at an EOS token rather than at the cap."""
        return int(response[-1]) in self.eos_ids

    def generate(
        self, prompts: Sequence[str], responses_per_prompt: int, seeds: Sequence[Sequence[Seed]], decode: bool = False
    ) -> BatchedSequences:
        """Sample responses under the policy.

        Args:
            prompts: B prompts.
            responses_per_prompt: G.
            seeds: [B][G], each an int or a tuple of ints that belongs to the response: the tokens do not depend on
                the batch that the response was sampled in.
            decode: fill `responses_text`.

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
        uniforms_NT = np.stack([self._uniforms(seed) for group in seeds for seed in group])
        responses: list[list[int]] = []
        sampled: list[Array] = []
        for start in range(0, len(rows), self.generation.gen_batch_size):
            part = slice(start, start + self.generation.gen_batch_size)
            tokens, logprobs = self._decode(rows[part], uniforms_NT[part])
            responses += tokens
            sampled += logprobs
        grouped = _grouped(responses, responses_per_prompt)
        batch = pack_sequences(encoded, grouped, _grouped(sampled, responses_per_prompt), self._pad_id())
        if not decode:
            return batch
        texts = [[self.tokenizer.decode(response, skip_special_tokens=True) for response in g] for g in grouped]
        return BatchedSequences(**{**vars(batch), "responses_text": texts})

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
        graph as long as the results live: pass one micro-batch at a time to bound memory.
        """
        flat: list[TokenStatistics] = []
        with torch.set_grad_enabled(with_grad):
            for part in sequences.micro_batches(tf_batch_size or self.generation.tf_batch_size):
                rows = [part.tokens(b, 0) for b in range(part.shape[0])]
                flat += self._score(rows, self.features if return_baseline_features else ())
        return _results(flat, sequences.shape[1], with_grad, compute_rb)

    def _uniforms(self, seed: Seed) -> Array:
        return response_uniforms(seed, self.generation.max_new_tokens)

    def _pad_id(self) -> int:
        """Any id that has an embedding: what is padding is said by the mask."""
        pad = self.tokenizer.pad_token_id
        return 0 if pad is None else int(pad)

    def _no_cache(self) -> CheckpointError:
        remedy = "need a decoder-only model with a key-value cache"
        return CheckpointError(bad_value("model.path", type(self.model).__name__, remedy))

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

    def _forward(self, input_ids: Tensor, mask: Tensor, keep: int, **cache: Any) -> Any:
        """One forward pass; logits of the last `keep` positions [N, keep, V] are in the output."""
        kwargs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": mask, **cache}
        if self._takes_positions:
            positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
            kwargs["position_ids"] = positions[:, -input_ids.shape[1] :]
        if self._keeps_logits:
            kwargs["logits_to_keep"] = keep
        output = self.model(**kwargs)
        output.logits = output.logits[:, -keep:]
        if not torch.isfinite(output.logits.detach().amax(dim=-1)).all():
            raise NonFiniteError("logits: the model gave NaN or infinity; check its weights and model.dtype")
        return output

    @torch.no_grad()
    def _decode(self, prompts: list[list[int]], uniforms_NT: Array) -> tuple[list[list[int]], list[Array]]:
        """Sample one response a row: token ids and log q when sampled."""
        device, cap = self.device, self.generation.max_new_tokens
        padded = pack_sequences(prompts, [[[]] for _ in prompts], pad_id=self._pad_id())
        ids, mask = padded.sequences[:, 0].to(device), padded.attention_masks[:, 0].to(device)
        uniforms = torch.from_numpy(uniforms_NT).to(device)
        eos = torch.tensor(self.eos_ids, dtype=torch.int64, device=device)
        tokens_NT = torch.full((len(prompts), cap), -1, dtype=torch.int64, device=device)
        logq_NT = torch.zeros((len(prompts), cap), dtype=torch.float64, device=device)
        alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
        cache = None
        for step in range(cap):
            output = self._forward(ids, mask, 1, past_key_values=cache, use_cache=True)
            cache = getattr(output, "past_key_values", None)
            if cache is None:
                raise self._no_cache()
            token_N, log_q_N = sample_rows(output.logits[:, -1], self.rule, uniforms[:, step])
            tokens_NT[alive, step] = token_N[alive]
            logq_NT[:, step] = log_q_N
            self.on_progress(int(alive.sum()))
            alive &= ~torch.isin(token_N, eos)
            if not alive.any():
                break
            ids, mask = token_N.unsqueeze(-1), torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
        lengths = (tokens_NT >= 0).sum(dim=-1).tolist()
        rows, logq = tokens_NT.tolist(), logq_NT.cpu().numpy()
        return [row[:n] for row, n in zip(rows, lengths, strict=True)], [
            logq[i, :n].copy() for i, n in enumerate(lengths)
        ]

    def _score(self, rows: list[TokenRow], features: Sequence[str]) -> list[TokenStatistics]:
        """Statistics of each row's response, from one forward pass."""
        device = self.device
        packed = pack_sequences([p.tolist() for p, _ in rows], [[r.tolist()] for _, r in rows], pad_id=self._pad_id())
        lengths = [len(response) for _, response in rows]
        width = max(lengths)
        ids, mask = packed.sequences[:, 0, :-1].to(device), packed.attention_masks[:, 0, :-1].to(device)
        logits_NTV = self._forward(ids, mask, width, use_cache=False).logits
        position_T = torch.cat([torch.arange(n) for n in lengths]).to(device)
        rows_T = torch.cat([torch.arange(n) + i * width for i, n in enumerate(lengths)]).to(device)
        tokens_T = torch.cat([response for _, response in rows]).to(device)
        flat = token_statistics(
            logits_NTV.reshape(-1, logits_NTV.shape[-1]), rows_T, tokens_T, position_T, self.rule,
            self.generation.max_new_tokens, features,
        )  # fmt: skip
        self.on_progress(len(tokens_T))
        columns = [flat.log_q_T, flat.entropy_T, flat.outside_T]
        split = [torch.split(column, lengths) for column in columns]
        feats = [None] * len(lengths) if flat.features_TD is None else torch.split(flat.features_TD, lengths)
        return [TokenStatistics(*parts) for parts in zip(*split, feats, strict=True)]


def _grouped(flat: list[Any], size: int) -> list[list[Any]]:
    return [flat[start : start + size] for start in range(0, len(flat), size)]


def to_float64(tensor: Tensor) -> Array:
    """A tensor's values as a float64 array on the CPU, detached."""
    values: Array = tensor.detach().cpu().double().numpy()
    return values


def _results(flat: list[TokenStatistics], group: int, with_grad: bool, compute_rb: bool) -> LogprobResults:
    surprisal = [-to_float64(row.log_q_T) for row in flat]
    features = [row.features_TD for row in flat]
    return LogprobResults(
        logprobs=_grouped([row.log_q_T for row in flat], group),
        entropies=_grouped(surprisal, group),
        sequence_logprobs=_grouped([-float(row.sum()) for row in surprisal], group),
        rb_entropies=_grouped([to_float64(row.entropy_T) for row in flat], group) if compute_rb else None,
        rb_entropies_torch=_grouped([row.entropy_T for row in flat], group) if compute_rb and with_grad else None,
        baseline_feats_torch=None if features[0] is None else _grouped(features, group),
        outside_nucleus=_grouped([row.outside_T.cpu().numpy() for row in flat], group),
    )
