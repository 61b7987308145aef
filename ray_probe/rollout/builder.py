"""Builds rollouts from a configuration: model, processor, components, gradient."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ray_probe.checkpoints.files import ADAPTER_FILES, CHECKPOINT_FILES, matching_files, stamp_of, unusable
from ray_probe.checkpoints.headers import weight_headers
from ray_probe.checkpoints.swap import Architecture, Policy, can_swap, leaves_base, load_policy, release, swap_weights
from ray_probe.checkpoints.tokenizer.eos import resolve_eos, token_text
from ray_probe.checkpoints.tokenizer.load import open_tokenizer
from ray_probe.checkpoints.tokenizer.token_ids import check_token_ids
from ray_probe.config import ProbeConfig
from ray_probe.gradient.along_update import GradientAlongUpdate
from ray_probe.gradient.shard_sum import GradientSum
from ray_probe.model.activation_checkpointing import set_recompute
from ray_probe.model.gradient_reach import refuse_unreached
from ray_probe.model.midpoint import check_same_tensors, replace_by_midpoint
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.comparison import Comparison
from ray_probe.rollout.midpoint import Midpoint
from ray_probe.rollout.policies import InTurns, PairOrMidpoint, Policies
from ray_probe.rollout.response_store import ResponseStore, SharedResponses
from ray_probe.rollout.rollout import Rollout
from ray_probe.run.preparation.prepared import baseline_rule
from ray_probe.sequence_processor import SequenceProcessor
from ray_probe.system.versions import made_on

OnProgress = Callable[[int], None]


class PolicySlot:
    """Holds one model, and copies the next checkpoint into it if it can.

    Attributes:
        way: whether the last checkpoint was `loaded`, or `swapped` into the earlier model.
    """

    way: Literal["loaded", "swapped"] = "loaded"

    def __init__(self) -> None:
        self._policy: Policy | None = None
        self._base = ""

    def bring_in(self, directory: Path, adapter: Path | None, dtype: str, device: str) -> Any:
        """Return the model of a checkpoint; the earlier one must not be used from then on.

        Under another adapter of the same kind, an unchanged base is not read again.
        """
        architecture = Architecture.of(directory, adapter, dtype, device)
        headers = weight_headers(directory)
        policy, self._policy = self._policy, None  # an error below must not leave a model with mixed weights
        before, self._base = self._base, f"{directory} {stamp_of(matching_files(directory, CHECKPOINT_FILES))}"
        if policy is not None and can_swap(policy, architecture, headers):
            has_base = before == self._base and adapter is not None and leaves_base(adapter)
            swap_weights(policy, directory, headers, adapter, has_base)
            self._policy, self.way = policy, "swapped"
            return policy.model
        if policy is not None:
            release(policy.model)
        del policy
        self._policy, self.way = load_policy(directory, adapter, architecture), "loaded"
        return self._policy.model

    def empty(self) -> None:
        """Free the model."""
        policy, self._policy = self._policy, None
        if policy is not None:
            release(policy.model)


class RolloutBuilder:
    """Builds rollouts of one checkpoint after another; reuses a model if it can."""

    def __init__(self) -> None:
        self._own, self._against = PolicySlot(), PolicySlot()

    @property
    def way(self) -> Literal["loaded", "swapped"]:
        """Whether the last checkpoint was `loaded`, or `swapped` into the earlier model."""
        return self._own.way

    def load(
        self,
        config: ProbeConfig,
        directory: Path,
        adapter: Path | None,
        policy_id: str,
        device: str = "cpu",
        on_progress: OnProgress = lambda tokens: None,
        store: ResponseStore | None = None,
    ) -> Rollout:
        """Load a checkpoint and build its rollout.

        Earlier rollouts must not be used from then on. Drop them first, because their gradient sums take memory. After
        an error no model is kept, and the next call loads one.

        Args:
            config: the run's configuration.
            directory: the checkpoint's directory on this node.
            adapter: the adapter's directory on this node, or None.
            policy_id: identifies the policy in records.
            device: `cpu` or `cuda`.
            on_progress: receives numbers of tokens done.
            store: of the responses of a series, or None.

        Raises:
            CheckpointError: the directory holds no complete checkpoint.
            ConfigError: `model.trainable` selects no parameter, or one that text cannot reach.
        """
        self._against.empty()
        model = self._own.bring_in(directory, adapter, config.model.dtype, device)
        set_recompute(model, config.estimator.activation_checkpointing)
        processor, rule = _processor(config, model, directory, adapter, on_progress), baseline_rule(config)
        components = ProbeComponents(processor, config.estimator.x_estimator_mode, config.generation.rb_requires_grad)
        gradient = GradientSum(model, config.model.trainable)
        refuse_unreached(model, gradient.parameters, config.model.trainable)
        shared = None if store is None else SharedResponses(store, config.compare.side)
        return Rollout(components, gradient, rule, policy_id, made_on(device, torch.get_num_threads()), shared)

    def compare(
        self,
        config: ProbeConfig,
        places: Sequence[tuple[Path, Path | None]],
        policy_id: str,
        device: str = "cpu",
        on_progress: OnProgress = lambda tokens: None,
        in_turns: bool = False,
        store: ResponseStore | None = None,
    ) -> Comparison:
        """Load two checkpoints and build their comparison; as `load`.

        Args:
            config: the run's configuration.
            places: directories of checkpoint and adapter on this node, of A and of B.
            policy_id: identifies both policies in records.
            device: `cpu` or `cuda`.
            on_progress: receives numbers of tokens done.
            in_turns: hold one model at a time: the same bits, in half the memory, with two loads a shard. Done for two
                adapters of one base in any case. Not with `compare.parts`, which needs the memory of both.
            store: of the responses of a chain, or None.

        Raises:
            ConfigError: `compare.parts` is set and the models differ in more than the values of their weights.
        """
        assert not (in_turns and config.compare.parts), "parts need the memory of both models"
        in_turns = in_turns or _share_base(places, config.model.dtype, device)
        slots = (self._own if in_turns else self._against, self._own)
        if in_turns:
            self._against.empty()
        stamps: dict[int, str] = {}

        def bring_in(side: int) -> SequenceProcessor:
            directory, adapter = places[side]
            _check_unchanged(stamps.setdefault(side, found := _stamp(*places[side])), found, directory)
            model = slots[side].bring_in(directory, adapter, config.model.dtype, device)
            set_recompute(model, False)
            return _processor(config, model, directory, adapter, on_progress)

        rule, made = baseline_rule(config), made_on(device, torch.get_num_threads())
        if in_turns:
            return Comparison(InTurns(bring_in), rule, policy_id, made, side=config.compare.side, store=store)
        halfway = PairOrMidpoint(bring_in, partial(_halved, config)) if config.compare.parts else None
        policies: Policies = (bring_in(0), bring_in(1)) if halfway is None else halfway
        a, b = policies[0].model, policies[1].model
        moved = moved_share(a, b) if all(adapter is None for _, adapter in places) else None
        midpoint = None if halfway is None else halfway.midpoint
        if halfway is not None:
            _check_halves(config, a, b)
        return Comparison(policies, rule, policy_id, made, moved, config.compare.side, midpoint, store)


def _check_halves(config: ProbeConfig, a: torch.nn.Module, b: torch.nn.Module) -> None:
    """Refuse models that have no midpoint, or one without the layers to recompute."""
    check_same_tensors(a, b)
    set_recompute(a, config.estimator.activation_checkpointing)
    set_recompute(a, False)


def _halved(config: ProbeConfig, a: SequenceProcessor, b: SequenceProcessor) -> Midpoint:
    """Return the midpoint of two policies, which takes their place with the update."""
    replace_by_midpoint(a.model, b.model)
    set_recompute(a.model, config.estimator.activation_checkpointing)
    middle = SequenceProcessor(
        a.model, a.tokenizer, config.generation, baseline_rule(config).features, a.on_progress,
        config.data.chat_template, a.eos_ids, config.data.context_length,
    )  # fmt: skip
    return Midpoint(middle, GradientAlongUpdate(a.model, b.model))


def _share_base(places: Sequence[tuple[Path, Path | None]], dtype: str, device: str) -> bool:
    """Return whether two adapters of one kind share a base and leave it as it is."""
    (a, adapter_a), (b, adapter_b) = places
    if a != b or adapter_a is None or adapter_b is None or not leaves_base(adapter_a):
        return False
    return Architecture.of(a, adapter_a, dtype, device) == Architecture.of(b, adapter_b, dtype, device)


def _stamp(directory: Path, adapter: Path | None) -> str:
    own = [] if adapter is None else matching_files(adapter, ADAPTER_FILES)
    return stamp_of([*matching_files(directory, CHECKPOINT_FILES), *own])


def _check_unchanged(first: str, now: str, directory: Path) -> None:
    """Refuse a checkpoint that changed since it was first loaded in this run."""
    if first != now:
        remedy = "measure a copy, or pin it with probe --snapshot"
        raise unusable(directory, "its files have changed while it was compared", remedy)


def _processor(
    config: ProbeConfig, model: Any, directory: Path, adapter: Path | None, on_progress: OnProgress
) -> SequenceProcessor:
    found = open_tokenizer(directory, adapter, model.config)
    rows = model.get_input_embeddings().weight.shape[0]
    check_token_ids(found, rows)
    explicit = config.generation.eos_token_ids
    eos = resolve_eos(explicit, found.eos_sources, rows, token_text(found.tokenizer))
    chat, context = config.data.chat_template, config.data.context_length
    return SequenceProcessor(
        model, found.tokenizer, config.generation, baseline_rule(config).features, on_progress, chat, eos.ids, context
    )


@torch.no_grad()
def moved_share(a: torch.nn.Module, b: torch.nn.Module) -> float | None:
    """Return the share of parameters that differ; None for other architectures."""
    first, second = dict(a.named_parameters()), dict(b.named_parameters())
    if {name: p.shape for name, p in first.items()} != {name: p.shape for name, p in second.items()}:
        return None
    moved = sum(int((first[name] != second[name]).sum()) for name in first)
    return moved / sum(p.numel() for p in first.values())


def build_rollout(
    config: ProbeConfig,
    directory: Path,
    policy_id: str,
    device: str = "cpu",
    on_progress: OnProgress = lambda tokens: None,
) -> Rollout:
    """Builds a rollout of a checkpoint and the adapter that the configuration names.

    Args:
        config: the run's configuration.
        directory: the checkpoint's directory on this node.
        policy_id: identifies the policy in records.
        device: `cpu` or `cuda`.
        on_progress: receives numbers of tokens done.
    """
    adapter = None if config.model.adapter is None else Path(config.model.adapter)
    return RolloutBuilder().load(config, directory, adapter, policy_id, device, on_progress)
