"""LoRAs on experts, tokens, tied heads and biases are measured as in peft."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from support.adapter_kinds import KINDS, MODELS, QUERY, copied
from support.adapters import write_adapter
from support.models import probe_config, save_checkpoint, tiny_llama
from support.oracle import row_gradient, row_statistics
from support.runs import components_of, gradient_of

from ray_probe.checkpoints.adapter.files import adapter_settings
from ray_probe.checkpoints.adapter.load import attach_adapter
from ray_probe.checkpoints.inspection import inspect_checkpoint
from ray_probe.checkpoints.load import load_model
from ray_probe.checkpoints.tokenizer.load import load_tokenizer
from ray_probe.config.schema import GenerationSettings, ModelConfig
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.errors import CheckpointError
from ray_probe.model.activation_checkpointing import set_recompute
from ray_probe.model.sequences import BatchedSequences
from ray_probe.model.trainable import adapter_parameters, select_trainable
from ray_probe.probe_components import ProbeComponents
from ray_probe.rollout.builder import RolloutBuilder
from ray_probe.rollout.rollout import Rollout
from ray_probe.sequence_processor import SequenceProcessor

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers

Directories = dict[tuple[str, int], Path]
CHARACTERS = "abcdef"
TEMPERATURE, TOP_P = 0.9, 0.9


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """Two checkpoints of each model."""
    root = tmp_path_factory.mktemp("bases")
    return {
        (name, seed): save_checkpoint(root / f"{name}{seed}", make(seed), CHARACTERS)
        for name, make in MODELS.items()
        for seed in (0, 1)
    }


@pytest.fixture(scope="module")
def adapters(bases: Directories, tmp_path_factory: pytest.TempPathFactory) -> Directories:
    """Two adapters of each kind, on the two checkpoints."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        (kind, seed): write_adapter(root / f"{kind}{seed}", bases[name, seed], seed=seed, r=2, **copied(settings))
        for kind, (name, settings) in KINDS.items()
        for seed in (0, 1)
    }


def opened(base: Path, adapter: Path, dtype: str = "float32") -> Any:
    found = inspect_checkpoint(ModelConfig(path=str(base), adapter=str(adapter)))
    assert found.adapter is not None
    model = load_model(found.directory, dtype)
    attach_adapter(model, found.adapter)
    return model


def plain_peft(base: Path, adapter: Path, trained: bool = False) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.PeftModel.from_pretrained(load_model(base, "float32"), str(adapter), is_trainable=trained)
    return wrapped.eval()


def policy_of(model: Any, base: Path) -> SequenceProcessor:
    settings = GenerationSettings(temperature=TEMPERATURE, top_p=TOP_P, max_new_tokens=10, tf_batch_size=3)
    return SequenceProcessor(model, load_tokenizer(base), settings)


def sampled(policy: SequenceProcessor) -> BatchedSequences:
    return policy.generate(["abc", "f"], 2, [[(1, b, g) for g in range(2)] for b in range(2)])


def gradient(policy: SequenceProcessor, trainable: str, sequences: BatchedSequences) -> dict[str, torch.Tensor]:
    policy.model.zero_grad(set_to_none=True)
    chosen = select_trainable(policy.model, trainable)
    ProbeComponents(policy).accumulate_sum_X(sequences, None)
    assert all(parameter.grad is not None for parameter in chosen.values())
    return {name: parameter.grad.clone() for name, parameter in chosen.items()}


def reference_gradient(model: Any, sequences: BatchedSequences) -> None:
    """Set `.grad` by peft's own forward, one response at a time, without padding."""
    prompts, group = sequences.shape
    for prompt, response in (sequences.tokens(b, g) for b in range(prompts) for g in range(group)):
        ids = torch.cat([prompt, response])[None]
        logits_TV = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        rows = list(zip(logits_TV.detach(), response.tolist(), strict=True))
        entropies = [row_statistics(row, token, TEMPERATURE, TOP_P)["H"] for row, token in rows]
        later = [sum(entropies[j + 1 :]) for j in range(len(rows))]
        slopes = [
            row_gradient(row, token, TEMPERATURE, TOP_P, (advantage, 1.0))
            for (row, token), advantage in zip(rows, later, strict=True)
        ]
        logits_TV.backward(torch.stack(slopes).to(logits_TV.dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_the_policy_is_the_one_that_peft_computes_and_the_adapter_moves_it(bases, adapters, kind: str):
    base, adapter = bases[KINDS[kind][0], 0], adapters[kind, 0]
    model, ids = opened(base, adapter), torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, plain_peft(base, adapter)(input_ids=ids).logits)
        assert not torch.allclose(logits, load_model(base, "float32")(input_ids=ids).logits, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_trainable_adapter_is_what_peft_trains(bases, adapters, kind: str):
    base, adapter = bases[KINDS[kind][0], 0], adapters[kind, 0]
    wrapped = plain_peft(base, adapter, trained=True)
    trained = {name for name, parameter in wrapped.get_base_model().named_parameters() if parameter.requires_grad}
    model = opened(base, adapter)
    assert adapter_parameters(model) == trained == set(select_trainable(model, "adapter"))


@pytest.mark.parametrize("trainable", ["adapter", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_pefts_own_autograd(bases, adapters, kind: str, trainable: str):
    base, adapter = bases[KINDS[kind][0], 0], adapters[kind, 0]
    policy = policy_of(opened(base, adapter), base)
    sequences = sampled(policy)
    ours = gradient(policy, trainable, sequences)
    theirs = plain_peft(base, adapter, trained=True).get_base_model()
    if trainable == "all":
        theirs.requires_grad_(True)
    reference_gradient(theirs, sequences)
    reached = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False) if p.grad is not None}
    assert ours.keys() <= reached.keys()
    assert len(ours) == sum(parameter.grad is not None for parameter in theirs.parameters())
    for name, value in ours.items():
        scale = float(reached[name].abs().max())
        assert scale > 0, name
        torch.testing.assert_close(value, reached[name], rtol=1e-4, atol=2e-5 * scale, msg=lambda m, n=name: n + m)


def test_recomputed_layers_give_the_same_gradient_through_fused_experts(bases, adapters):
    kind = "both fused expert weights"
    base = bases["mixtral", 0]
    policy = policy_of(opened(base, adapters[kind, 0]), base)
    sequences = sampled(policy)
    plain = gradient(policy, "adapter", sequences)
    set_recompute(policy.model, True)
    for name, value in gradient(policy, "adapter", sequences).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_sampled_is_what_is_scored(bases, adapters, kind: str, dtype: str):
    base = bases[KINDS[kind][0], 0]
    policy = policy_of(opened(base, adapters[kind, 0], dtype), base)
    sequences = sampled(policy)
    results = policy.teacher_force_logprobs(sequences)
    assert sequences.sample_logprobs is not None
    places = [(b, g) for b in range(2) for g in range(2)]
    log_q, scored, outside = (
        np.concatenate([table[b][g] for b, g in places])
        for table in (sequences.sample_logprobs, results.entropies, results.outside_nucleus)
    )
    assert ParityStats.of(log_q, -scored, outside).mean_gap < (1e-5 if dtype == "float32" else 2e-2)


# Inert, or not


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_adapter_of_any_kind_is_refused_as_inert(bases, tmp_path: Path, kind: str):
    name, settings = KINDS[kind]
    untrained = write_adapter(tmp_path / "a", bases[name, 0], spread=0.0, r=2, **copied(settings))
    with pytest.raises(CheckpointError, match=r"^model\.adapter: .*inert: its lora_B is all zero"):
        inspect_checkpoint(ModelConfig(path=str(bases[name, 0]), adapter=str(untrained)), hashed=False)
    with pytest.raises(CheckpointError, match=r"^model\.adapter: .*inert: it moves no logit in torch\.float32"):
        attach_adapter(load_model(bases[name, 0], "float32"), untrained)


@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        ("one fused expert weight", "experts.*lora_B"),
        ("tokens", "tokens_delta"),
        ("tokens of a tied head", "tokens_delta"),
        ("biases of the LoRA's layers", "bias$"),
        ("all biases", "k_proj.bias$|v_proj.bias$"),
    ],
)
def test_an_adapter_that_has_trained_one_part_alone_is_not_inert(bases, tmp_path: Path, kind: str, moved: str):
    name, settings = KINDS[kind]
    adapter = write_adapter(tmp_path / "a", bases[name, 0], moved=moved, r=2, **copied(settings))
    assert adapter_parameters(opened(bases[name, 0], adapter))


def test_tokens_that_a_short_text_would_miss_are_tried(tmp_path: Path):
    base = save_checkpoint(tmp_path / "c", tiny_llama(1000), CHARACTERS)
    settings = QUERY | {"trainable_token_indices": [977]}
    assert adapter_parameters(opened(base, write_adapter(tmp_path / "a", base, moved="tokens_delta", **settings)))


# Swaps, settings, older files


def measured(rollout: Rollout) -> list[Any]:
    components = components_of(rollout)
    sequences = sampled(components.processor)
    gradient_of(rollout).clear()
    components.accumulate_sum_X(sequences, None)
    assert sequences.sample_logprobs is not None
    log_q = [row.tolist() for group in sequences.sample_logprobs for row in group]
    return [log_q, [parameter.grad.tolist() for parameter in gradient_of(rollout).parameters.values()]]


def brought_in(assembly: RolloutBuilder, base: Path, adapter: Path) -> Rollout:
    config = probe_config(
        base, model={"adapter": str(adapter), "trainable": "adapter"}, data={"prompts": ["abc"]},
        generation={"max_new_tokens": 8},
    )  # fmt: skip
    return assembly.load(config, base, adapter, "policy")


@pytest.mark.parametrize("kind", KINDS)
def test_the_next_checkpoint_with_its_adapter_measures_as_one_loaded_anew(bases, adapters, kind: str):
    name = KINDS[kind][0]
    first, second = ((bases[name, seed], adapters[kind, seed]) for seed in (0, 1))
    live = RolloutBuilder()
    measured(brought_in(live, *first))
    after = measured(brought_in(live, *second))
    assert live.way == ("loaded" if name == "mixtral" else "swapped")  # its files hold one tensor an expert
    assert after == measured(brought_in(RolloutBuilder(), *second)) != measured(brought_in(RolloutBuilder(), *first))


@pytest.mark.parametrize("kind", ["fused experts with biases", "tokens", "all biases"])
def test_a_swapped_adapter_is_inert_or_not_beside_its_own_checkpoint(bases, adapters, tmp_path: Path, kind: str):
    name, settings = KINDS[kind]
    part = "tokens_delta" if kind == "tokens" else "bias$"
    barely = write_adapter(tmp_path / "barely", bases[name, 1], r=2, moved=part, **copied(settings))
    untrained = write_adapter(tmp_path / "untrained", bases[name, 1], r=2, spread=0.0, **copied(settings))
    live = RolloutBuilder()
    brought_in(live, bases[name, 0], adapters[kind, 0])
    brought_in(live, bases[name, 1], barely)
    assert live.way == "swapped"
    with pytest.raises(CheckpointError, match=r"^model\.adapter: .*inert"):
        brought_in(live, bases[name, 1], untrained)


def test_the_order_of_trained_tokens_is_part_of_the_architecture(bases, tmp_path: Path):
    first, second = (
        write_adapter(tmp_path / str(n), bases["llama", 0], **QUERY, trainable_token_indices=order)
        for n, order in enumerate(([5, 3], [3, 5]))
    )
    assert adapter_settings(first) != adapter_settings(second)


def test_an_adapter_of_single_experts_from_older_versions_is_put_on_the_fused_ones(bases, tmp_path: Path):
    base, own = bases["mixtral", 0], torch.Generator().manual_seed(0)
    weights, lora = safetensors.torch.load_file(base / "model.safetensors"), {}
    merged = dict(weights)
    for name in [name for name in weights if ".experts." in name]:
        height, width = weights[name].shape
        down, up = (torch.randn(shape, generator=own) * 0.3 for shape in ((2, width), (height, 2)))
        path = f"base_model.model.{name.removesuffix('.weight')}.lora"
        lora |= {f"{path}_A.weight": down, f"{path}_B.weight": up}
        merged[name] = weights[name] + 2.0 * up @ down
    adapter = tmp_path / "a"
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["w1", "w2", "w3"], task_type="CAUSAL_LM")
    config.save_pretrained(str(adapter))
    safetensors.torch.save_file(lora, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        logits = opened(base, adapter)(input_ids=ids).logits
        safetensors.torch.save_file(merged, base / "model.safetensors", metadata={"format": "pt"})
        expected = load_model(base, "float32")(input_ids=ids).logits
        safetensors.torch.save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_tied_lora_that_was_trained_apart_keeps_both_halves(bases, adapters, tmp_path: Path):
    base, adapter = bases["llama_tied", 0], adapters["a LoRA on embedding and tied head", 0]
    apart = tmp_path / "a"
    apart.mkdir()
    (apart / "adapter_config.json").write_text((adapter / "adapter_config.json").read_text())
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_A.weight"] += 1.0
    safetensors.torch.save_file(tensors, apart / "adapter_model.safetensors", metadata={"format": "pt"})
    held = dict(opened(base, apart).named_parameters())
    for name in ("lm_head.lora_A.default.weight", "model.embed_tokens.lora_embedding_B.default"):
        stored = tensors["base_model.model." + name.replace(".default", "")]
        assert torch.equal(held[name], stored), name
