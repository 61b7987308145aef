"""Trials of a model at load, on a few tokens.

A response must have the same numbers when it is sampled token by token from a cache, padded and beside others, as when
it is scored in one pass. Whether a model does that is tried here, before anything is sampled: what it cannot do is left
out, and a model that cannot be measured is refused.

Shape suffixes: N rows, L positions, P positions of the first pass, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import cache_utils

from ray_probe.core.estimator.parity import TOLERANCE_NATS
from ray_probe.core.policy.logits import Buffer
from ray_probe.errors import CheckpointError, ParityError, bad_value
from ray_probe.model.head import tried_ids
from ray_probe.model.model_call import call_model
from ray_probe.model.sequences import TokenRow

if TYPE_CHECKING:
    from ray_probe.model.forward import Forward

MEASURED_TOKENS = 64
ROUNDING, BROKEN = (3e-5, 0.1), (1e-2, 0.1)
"""How far logits may be apart, in units of their spread, in float32 or wider and in narrower dtypes: by rounding, and
before a model is refused. Of 166 architectures rounding came to at most 7e-6, and to 0.03 in bfloat16 over 24 layers;
what is wrong was at 0.03 to 1, a cache that loses a little at 1e-4."""
_ERRORS = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
# Caches whose every layer is one of these, and no subclass, keep all of a row's state in its keys and values.
_ROW_WISE = tuple(
    getattr(cache_utils, name)
    for name in ("DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer")
    if hasattr(cache_utils, name)  # transformers before 5.20 has no DynamicIndexedLayer
)


@dataclass(frozen=True)
class Traits:
    """What a model was found to do.

    Attributes:
        takes_padding: prompts of different length can be in one batch, padded on the left.
        drops_rows: rows that have ended can be taken out of its cache.
        cache_gap: mean gap of log p between steps from its cache and one pass over the same tokens, nats; 0.0 where it
            is no more than rounding.
    """

    takes_padding: bool
    drops_rows: bool
    cache_gap: float


@torch.no_grad()
def try_model(forward: "Forward") -> Traits:
    """Try a model on a few tokens.

    Raises:
        CheckpointError: its logits depend on later tokens or on other rows, its positions do not count from 0, or it
            cannot go on from its cache.
    """
    trial = _Trial(forward)
    if not torch.isfinite(trial.whole_LV).all():
        return Traits(takes_padding=True, drops_rows=False, cache_gap=0.0)  # sampling raises NonFiniteError
    trial.check_scoring()
    if len(trial.ids_L) == 1:  # a context of one token: no token is ever fed back
        return Traits(takes_padding=False, drops_rows=False, cache_gap=0.0)
    return Traits(cache_gap=trial.cache_gap(), takes_padding=trial.takes_padding(), drops_rows=trial.drops_rows())


def check_cache_gap(forward: "Forward", tolerance_nats: float | None) -> None:
    """Refuse a model whose cache alone would fail the parity gate.

    Args:
        forward: the model, tried.
        tolerance_nats: largest mean gap that the gate allows; None: by the dtype of the weights.

    Raises:
        ParityError: with the measured gap.
    """
    dtype = str(forward.model.get_input_embeddings().weight.dtype).removeprefix("torch.")
    allowed = TOLERANCE_NATS.get(dtype, TOLERANCE_NATS["bfloat16"]) if tolerance_nats is None else tolerance_nats
    if forward.cache_gap > allowed:
        raise ParityError(
            f"generation.parity_tolerance: got {allowed:g} nats; steps of {type(forward.model).__name__} from its "
            f"key-value cache are {forward.cache_gap:.2g} nats a token from one pass over the same tokens, so the "
            "scored policy would not be the one that sampled: use a version of transformers, or kernels, without this "
            "gap, or allow it"
        )


def can_select(cache: Any) -> bool:
    """Whether a cache is of a kind whose rows can be taken out: nothing but keys and values, one table a row."""
    layers = getattr(cache, "layers", ())
    plain = type(cache) in (cache_utils.Cache, cache_utils.DynamicCache)
    return plain and len(layers) > 0 and all(type(layer) in _ROW_WISE for layer in layers)


class _Trial:
    """The tokens of a trial, and the model's own logits of them from one pass [L, V]."""

    def __init__(self, forward: "Forward") -> None:
        self.forward = forward
        dtype = forward.model.get_input_embeddings().weight.dtype
        self.narrow = dtype not in (torch.float32, torch.float64)
        self.ids_L = tried_ids(forward.model)[0]
        self.half = max(1, len(self.ids_L) // 2)
        self.whole_LV = self._alone(self.ids_L)

    def check_scoring(self) -> None:
        """Refuse a model whose logits depend on more than the tokens before, at positions from 0."""
        half = self.half
        if off := self._broken(self.whole_LV[:half], self._alone(self.ids_L[:half])):
            remedy = f"need a causal language model: with later tokens left out its logits are {off}"
            raise self._refusal(f"{remedy} (an encoder or embedding model?)")
        with self._refused("scoring"):
            scored_LV = self.forward.logits([_scored(self.ids_L)], pad_id=0)
            rows = [_scored(self.ids_L[:half]), _scored(self.ids_L.flip(0))]
            beside_LV = self.forward.logits(rows, pad_id=0)[:half]
        if off := self._broken(self.whole_LV, scored_LV):
            raise self._refusal(f"need a model whose positions count from 0: given them, its logits are {off}")
        if off := self._broken(self.whole_LV[:half], beside_LV):
            raise self._refusal(f"need a model that takes each row by itself: beside another, its logits are {off}")

    def cache_gap(self) -> float:
        """Mean gap of log p between single steps and one pass, nats; 0.0 where rounding explains it."""
        if self._same(self.whole_LV[self.half :], self._stepped(self.ids_L)):
            return 0.0
        # What a cache loses adds up, so it is measured over more tokens.
        ids_L = tried_ids(self.forward.model, MEASURED_TOKENS)[0]
        log_p_LV = torch.log_softmax(self._alone(ids_L)[self.half :].double(), dim=-1)
        gap_LV = (torch.log_softmax(self._stepped(ids_L).double(), dim=-1) - log_p_LV).abs()
        return float((log_p_LV.exp() * gap_LV).sum(dim=-1).mean())

    def _stepped(self, ids_L: Tensor) -> Tensor:
        """Logits at the tokens after the first half of a trial's, each from a step of its own."""
        stepped = []
        with self._refused("a step from its key-value cache"):
            _, cache = self._first(ids_L[None, : self.half])
            for place in range(self.half, len(ids_L)):
                logits_1V, cache = self._next(ids_L[None, place : place + 1], place + 1, cache)
                stepped.append(logits_1V)
        return torch.cat(stepped)

    def takes_padding(self) -> bool:
        """Whether a row that is padded on the left has the same logits, at once and a step later."""
        ids_L = self.ids_L[:-1]  # so that there is room for padding in the context
        first = max(1, len(ids_L) - 1)
        padded_1P = torch.nn.functional.pad(ids_L[None, :first], (1, 0))
        mask_1L = torch.ones_like(self.ids_L)[None]
        mask_1L[0, 0] = 0
        try:
            logits_1V, cache = self.forward.step(padded_1P, mask_1L[:, : first + 1], None, Buffer())
            found = [logits_1V.clone()]
            if first < len(ids_L):
                found.append(self.forward.step(ids_L[None, first:], mask_1L, cache, Buffer())[0])
        except _ERRORS as error:
            _pass_on(error)
            return False
        return self._same(self.whole_LV[first - 1 : len(ids_L)], torch.cat(found))

    def drops_rows(self) -> bool:
        """Whether a row goes on with the same logits when the row beside it was taken out of the cache."""
        other_L = self.ids_L.flip(0)[: self.half + 1]
        try:
            _, cache = self._first(torch.stack([self.ids_L[: self.half], other_L[:-1]]))
            if not can_select(cache):
                return False
            cache.batch_select_indices(torch.tensor([1], device=other_L.device))
            found_1V, _ = self._next(other_L[None, -1:], len(other_L), cache)
        except _ERRORS as error:
            _pass_on(error)
            return False
        return self._same(self._alone(other_L)[-1:], found_1V)

    def _alone(self, ids_L: Tensor) -> Tensor:
        with self._refused("a forward pass"):
            logits_LV: Tensor = call_model(self.forward.model, input_ids=ids_L[None], use_cache=False).logits[0]
        return logits_LV

    def _first(self, ids_NP: Tensor) -> tuple[Tensor, Any]:
        return self.forward.step(ids_NP, torch.ones_like(ids_NP), None, Buffer())

    def _next(self, ids_N1: Tensor, length: int, cache: Any) -> tuple[Tensor, Any]:
        return self.forward.step(ids_N1, ids_N1.new_ones((len(ids_N1), length)), cache, Buffer())

    def _same(self, expected_LV: Tensor, found_LV: Tensor) -> bool:
        return _apart(expected_LV, found_LV) <= ROUNDING[self.narrow]

    def _broken(self, expected_LV: Tensor, found_LV: Tensor) -> str:
        """How logits differ that must be the same for the model to be measured; empty where they do not."""
        apart = _apart(expected_LV, found_LV)
        return "" if apart <= BROKEN[self.narrow] else f"{apart:.2g} of their spread off"

    def _refusal(self, remedy: str) -> CheckpointError:
        return CheckpointError(bad_value("model.path", type(self.forward.model).__name__, remedy))

    @contextmanager
    def _refused(self, what: str) -> Iterator[None]:
        """Turn what transformers raises into one line."""
        try:
            yield
        except _ERRORS as error:
            _pass_on(error)
            text = " ".join(str(error).split())[:200]
            told = f"{what} fails in transformers ({type(error).__name__}: {text})"
            raise self._refusal(f"{told}; use a version, or a model.dtype, that can") from error


def _scored(ids_L: Tensor) -> TokenRow:
    """A row whose scoring gives the logits at each of these tokens."""
    return ids_L[:1], torch.cat([ids_L[1:], ids_L[:1]])


def _apart(expected_LV: Tensor, found_LV: Tensor) -> float:
    """Root mean square of the difference, in units of the logits' own spread; the mean over positions."""
    gap_L = (found_LV.float() - expected_LV.float()).square().mean(dim=-1).sqrt()
    spread_L = expected_LV.float().std(dim=-1, correction=0)
    return float((gap_L / spread_L.clamp(min=1e-6)).mean())


def _pass_on(error: Exception) -> None:
    """Raise what says nothing about the model: a device that is full."""
    if isinstance(error, torch.OutOfMemoryError):
        raise error
