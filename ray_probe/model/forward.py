"""Run a causal language model from tokens to logits or hidden states.

Shape suffixes: N rows, P width of new tokens, L width of whole sequences, T scored tokens, D hidden, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ray_probe.core.policy.logits import Buffer
from ray_probe.errors import CheckpointError, NonFiniteError, bad_value
from ray_probe.model.head import ModelHead, find_head
from ray_probe.model.model_call import call_model
from ray_probe.model.sequences import TokenRow
from ray_probe.model.trials import try_model

CACHE = "need a decoder-only model with a key-value cache"


class Forward:
    """Runs a model in eval mode.

    Args:
        model: a transformers causal language model.

    Attributes:
        head: its LM head, or None if it cannot be split off.
        why_no_head: the reason for None.
        takes_padding, drops_rows, cache_gap: see `ray_probe.model.trials.Traits`.

    Raises:
        CheckpointError: it has no key-value cache, or a trial refuses it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        refuse_without_cache(model)
        accepted = inspect.signature(model.forward).parameters
        self._takes_positions = "position_ids" in accepted
        self._keeps_logits = "logits_to_keep" in accepted
        self.head: ModelHead | None
        self.head, self.why_no_head = find_head(model)
        self.takes_padding, self.drops_rows, self.cache_gap = try_model(self)

    @property
    def device(self) -> torch.device:
        """Device of the model's weights."""
        device: torch.device = next(self.model.parameters()).device
        return device

    def next_logits(self, ids_NP: Tensor, mask_NL: Tensor, cache: Any, buffer: Buffer) -> tuple[Tensor, Any]:
        """Return the logits of the next token of each row [N, V], and the new cache.

        Args:
            ids_NP: new tokens: the prompts, padded on the left, then one token a row.
            mask_NL: 1 at real tokens, of all tokens so far.
            cache: returned by the previous call; None at first.
            buffer: memory for the logits, which are valid until its next use.

        Raises:
            NonFiniteError: a logit is NaN or infinite.
        """
        logits_NV, cache = self.step(ids_NP, mask_NL, cache, buffer)
        refuse_non_finite(logits_NV.amax(dim=-1))
        return logits_NV, cache

    def step(self, ids_NP: Tensor, mask_NL: Tensor, cache: Any, buffer: Buffer) -> tuple[Tensor, Any]:
        """Do the same as `next_logits` without the check of the logits."""
        inputs: dict[str, Any] = {
            "input_ids": ids_NP, "attention_mask": mask_NL, "past_key_values": cache, "use_cache": True,
        }  # fmt: skip
        if self._takes_positions:
            positions_NL = (mask_NL.cumsum(dim=-1) - 1).clamp(min=0)
            inputs["position_ids"] = positions_NL[:, -ids_NP.shape[1] :]
        if self.head is not None:
            hidden_NPD, cache = self.head.hidden(**inputs)
            logits_NV = self.head.logits(hidden_NPD[:, -1], buffer)
        else:
            output = call_model(self.model, **inputs, **({"logits_to_keep": 1} if self._keeps_logits else {}))
            logits_NV, cache = output.logits[:, -1], getattr(output, "past_key_values", None)
        if cache is None:
            raise _no_cache(self.model)
        return logits_NV, cache

    def hidden(self, rows: Sequence[TokenRow], pad_id: int) -> Tensor:
        """Return hidden states [T, D] that predict the responses' tokens, with graph."""
        assert self.head is not None, "call `logits` without a head"
        hidden_NLD, _ = self.head.hidden(**self._whole(rows, pad_id))
        return hidden_NLD.flatten(0, 1).index_select(0, self._predicting(rows, hidden_NLD.shape[1]))

    def logits(self, rows: Sequence[TokenRow], pad_id: int) -> Tensor:
        """Return logits [T, V] that predict the responses' tokens, with graph."""
        logits_NLV: Tensor = call_model(self.model, **self._whole(rows, pad_id)).logits
        return logits_NLV.flatten(0, 1).index_select(0, self._predicting(rows, logits_NLV.shape[1]))

    def _whole(self, rows: Sequence[TokenRow], pad_id: int) -> dict[str, Any]:
        """Return a model's inputs for whole sequences without their last tokens."""
        # Padding stands on the right, where no real token sees it, so no mask is needed and positions count from 0.
        sequences = [torch.cat(row)[:-1] for row in rows]
        ids_NL = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=pad_id).to(self.device)
        inputs: dict[str, Any] = {"input_ids": ids_NL, "use_cache": False}
        if self._takes_positions:
            inputs["position_ids"] = torch.arange(ids_NL.shape[1], device=self.device).expand_as(ids_NL)
        return inputs

    def _predicting(self, rows: Sequence[TokenRow], width: int) -> Tensor:
        """Return the places in the flattened batch that predict the responses' tokens [T]."""
        places = [
            torch.arange(len(response)) + row * width + len(prompt) - 1 for row, (prompt, response) in enumerate(rows)
        ]
        return torch.cat(places).to(self.device)


def refuse_without_cache(model: Any) -> None:
    """Raise CheckpointError for a model that takes no key-value cache."""
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise _no_cache(model)


def _no_cache(model: Any) -> CheckpointError:
    return CheckpointError(bad_value("model.path", type(model).__name__, CACHE))


def refuse_non_finite(numbers: Tensor) -> None:
    """Refuse logits with NaN or infinity. Raises NonFiniteError."""
    if not torch.isfinite(numbers.detach()).all():
        raise NonFiniteError("logits: the model gave NaN or infinity; check its weights and model.dtype")
