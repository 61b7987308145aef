"""An adapter is loaded whole or refused in one line; only it gets a gradient."""

import json
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import safetensors.torch
import torch
from support.adapters import write_adapter
from support.models import save_checkpoint, tiny_gpt2, tiny_llama, tiny_model

import ray_probe.checkpoints.adapter.load
from ray_probe.checkpoints.adapter.files import adapter_settings
from ray_probe.checkpoints.adapter.load import attach_adapter
from ray_probe.checkpoints.fingerprint import adapter_fingerprint, check_fingerprint
from ray_probe.checkpoints.inspection import inspect_checkpoint
from ray_probe.checkpoints.load import load_model
from ray_probe.checkpoints.tokenizer.load import load_tokenizer
from ray_probe.config.schema import GenerationSettings, ModelConfig
from ray_probe.core.estimator.parity import ParityStats
from ray_probe.errors import CheckpointError, ConfigError
from ray_probe.model.sequences import BatchedSequences
from ray_probe.model.trainable import adapter_parameters, select_trainable
from ray_probe.probe_components import ProbeComponents
from ray_probe.sequence_processor import SequenceProcessor

CHARACTERS = "abcdef"
WEIGHTS = "adapter_model.safetensors"
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers
DEMO = Path(__file__).parents[3] / "configs" / "models" / "tiny"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("base") / "c", tiny_llama(8), CHARACTERS)


@pytest.fixture(scope="module")
def pristine(base: Path) -> Path:
    return write_adapter(base.parent / "adapter", base, lora_dropout=0.4)


@pytest.fixture
def adapter(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "a"))


def settings(base: Path, adapter: Path | None, **others: Any) -> ModelConfig:
    return ModelConfig(path=str(base), adapter=None if adapter is None else str(adapter), **others)


def opened(base: Path, adapter: Path, dtype: str = "float32") -> Any:
    """The model with the adapter inside, by everything that a run does."""
    found = inspect_checkpoint(settings(base, adapter))
    assert found.adapter is not None
    model = load_model(found.directory, dtype)
    attach_adapter(model, found.adapter)
    return model


def edit_json(directory: Path, **changes: Any) -> None:
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(directory: Path, change: Callable[[Tensors], object]) -> None:
    tensors = safetensors.torch.load_file(directory / WEIGHTS)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


# Refusals

FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


class Boom:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return (Path.touch, (self.marker,))


def pickled(path: Path) -> None:
    (path / WEIGHTS).unlink()
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Boom(path / "ran")))


def remote_code(path: Path) -> None:
    (path / "code.py").write_text(f"from pathlib import Path\nPath({str(path / 'ran')!r}).touch()\n")
    edit_json(path, auto_map={"AutoModel": "code.Model"})


def halved(path: Path) -> None:
    data = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(data[: len(data) // 2])


def reshaped(tensors: Tensors) -> None:
    tensors[FIRST + "A.weight"] = torch.ones(3, 17)


SPOILT: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing directory": (shutil.rmtree, ("no such directory", "give the directory")),
    "no settings": (lambda path: (path / "adapter_config.json").unlink(), ("no adapter_config.json",)),
    "settings that are not JSON": (
        lambda path: (path / "adapter_config.json").write_text("{"), ("cannot be read as JSON", "copy it again")),
    "only pickles": (pickled, (WEIGHTS, "pickle weights are not loaded")),
    "half the weights": (halved, ("truncated or damaged", "export it again")),
    "no tensor": (lambda path: edit_weights(path, dict.clear), ("holds no tensor", "save it again")),
    "remote code": (remote_code, ("remote code (auto_map)", "save it without")),
    "another kind": (lambda path: edit_json(path, peft_type="PREFIX_TUNING"), ("'PREFIX_TUNING'", "need a LORA")),
    "no kind": (lambda path: edit_json(path, peft_type=None), ("peft_type is None", "need a LORA")),
    "another task": (lambda path: edit_json(path, task_type="SEQ_CLS"), ("task_type", "SEQ_CLS", "convert it")),
    "weights changed on loading": (
        lambda path: edit_json(path, init_lora_weights="pissa"), ("init_lora_weights", "pissa", "convert it")),
    "a file of its own": (
        lambda path: edit_json(path, corda_config={"cache_file": "cache.pt"}), ("corda_config", "convert it")),
    "code by name": (
        lambda path: edit_json(path, megatron_config={"a": 1}, megatron_core="code"), ("megatron_config",)),
    "another policy by token": (
        lambda path: edit_json(path, alora_invocation_tokens=[1]), ("alora_invocation_tokens",)),
    "layers of its own": (lambda path: edit_json(path, layer_replication=[[0, 2], [1, 2]]), ("layer_replication",)),
    "a key of a later version": (lambda path: edit_json(path, sharpen={"by": 2}), ("sets sharpen",)),
    "missing tensor": (
        lambda path: edit_weights(path, lambda t: t.pop(FIRST + "B.weight")),
        ("1 parameters are not in it: model.layers.0.self_attn.q_proj.lora_B.default.weight", "saved whole")),
    "unexpected tensor": (
        lambda path: edit_weights(path, lambda t: t.update({FIRST.replace("0", "7") + "B.weight": torch.ones(2)})),
        ("1 tensors fit nothing in the model: model.layers.7.self_attn.q_proj.lora_B", "this very checkpoint")),
    "another shape": (
        lambda path: edit_weights(path, reshaped), ("size mismatch for model.layers.0.self_attn.q_proj.lora_A",)),
    "another rank": (lambda path: edit_json(path, r=5), ("size mismatch", "this very checkpoint")),
    "modules that are not there": (
        lambda path: edit_json(path, target_modules=["nowhere"]), ("nowhere", "not found in the base model")),
    "a saved module that is not in it": (
        lambda path: edit_json(path, modules_to_save=["lm_head"]), ("has no base_model.model.lm_head.weight",)),
    "NaN": (
        lambda path: edit_weights(path, lambda t: t[FIRST + "A.weight"].fill_(torch.nan)),
        (f"NaN or infinity in 1 tensors: {FIRST}A.weight", "save it again")),
}  # fmt: skip


@pytest.mark.parametrize("name", SPOILT)
def test_a_spoilt_adapter_is_refused_in_one_line_and_none_of_its_code_runs(base: Path, adapter: Path, name: str):
    spoiler, says = SPOILT[name]
    spoiler(adapter)
    with pytest.raises(CheckpointError) as caught:
        opened(base, adapter)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message and len(message) < 600
    assert message.startswith(f"model.adapter: got '{adapter}'"[:80])
    for part in says:
        assert part in message
    assert not (adapter / "ran").exists(), "no code of the adapter may run"


@pytest.mark.parametrize("name", ["missing tensor", "unexpected tensor", "another shape", "modules that are not there"])
def test_what_does_not_fit_the_model_is_known_before_weights_are_loaded(base: Path, adapter: Path, name: str):
    SPOILT[name][0](adapter)
    with pytest.raises(CheckpointError, match=r"^model\.adapter"):
        inspect_checkpoint(settings(base, adapter), hashed=False)


def test_an_adapter_of_another_model_is_refused_before_weights_are_loaded(base: Path, adapter: Path, tmp_path: Path):
    wider = tiny_llama(8, spread=0.3)
    wider.config.hidden_size = 32
    other = save_checkpoint(tmp_path / "other", type(wider)(wider.config), CHARACTERS)
    with pytest.raises(CheckpointError, match=r"^model\.adapter: .*size mismatch"):
        inspect_checkpoint(settings(other, adapter))


def test_an_adapter_that_moves_no_logit_is_refused_as_inert(base: Path, tmp_path: Path):
    untrained = write_adapter(tmp_path / "untrained", base, spread=0.0)
    with pytest.raises(
        CheckpointError, match=r"^model\.adapter: .*inert.*train it for a step, or leave model\.adapter"
    ):
        opened(base, untrained)


def test_an_adapter_in_the_place_of_a_checkpoint_is_sent_to_its_own_key(adapter: Path):
    with pytest.raises(CheckpointError, match=r"^model\.path: .*name it in model\.adapter"):
        inspect_checkpoint(settings(adapter, None))


def test_trainable_adapter_without_an_adapter_is_refused_at_once_and_at_the_model(base: Path):
    for refused in (
        lambda: inspect_checkpoint(settings(base, None, trainable="adapter")),
        lambda: select_trainable(load_model(base, "float32"), "adapter"),
    ):
        with pytest.raises(ConfigError, match=r"^model\.trainable: got 'adapter'; .*model\.adapter"):
            refused()


def test_without_peft_the_remedy_is_named(base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"^model\.adapter: .*pip install -e '\.\[peft\]'$"):
        inspect_checkpoint(settings(base, adapter))
    assert inspect_checkpoint(settings(base, None)).adapter is None


def test_peft_is_imported_for_an_adapter_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it fails
    for module in (ray_probe.checkpoints.adapter.files, ray_probe.checkpoints.adapter.load):
        runpy.run_path(str(Path(module.__file__)))


# What is loaded


def plain_peft(base: Path, adapter: Path) -> Any:
    return peft.PeftModel.from_pretrained(load_model(base, "float32"), str(adapter)).eval()


@pytest.mark.parametrize(
    "kind",
    [
        {"lora_dropout": 0.4},
        {"use_dora": True},
        {"use_rslora": True, "rank_pattern": {"down_proj": 2}},
        {"target_modules": "all-linear"},
        {"task_type": None},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_the_policy_is_the_one_that_peft_computes(base: Path, tmp_path: Path, kind: dict[str, Any]):
    adapter = write_adapter(tmp_path / "a", base, **kind)
    model, ids = opened(base, adapter), torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits
        assert torch.equal(logits, plain_peft(base, adapter)(input_ids=ids).logits)
        assert not torch.allclose(logits, load_model(base, "float32")(input_ids=ids).logits, atol=1e-2)
        assert torch.equal(logits, model(input_ids=ids).logits), "dropout must be off"
    assert not any(module.training for module in model.modules())


def test_an_adapter_of_a_layernorm_model_with_transposed_weights_loads(tmp_path: Path):
    gpt2 = save_checkpoint(tmp_path / "c", tiny_gpt2(8, torch.float32), CHARACTERS)
    adapter = write_adapter(tmp_path / "a", gpt2, target_modules=["c_attn"], fan_in_fan_out=True)
    assert adapter_parameters(opened(gpt2, adapter)) == {
        f"transformer.h.0.attn.c_attn.lora_{side}.default.weight" for side in "AB"
    }


@pytest.mark.parametrize(
    ("weights", "adapters"), [("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")]
)
def test_an_adapter_is_held_in_float32_or_wider_exactly_as_it_was_saved(
    base: Path, adapter: Path, weights: str, adapters: str
):
    model = opened(base, adapter, weights)
    stored = safetensors.torch.load_file(adapter / WEIGHTS)
    own = {name: parameter for name, parameter in model.named_parameters() if name in adapter_parameters(model)}
    assert len(own) == len(stored) == 8
    for name, parameter in own.items():
        assert parameter.dtype == getattr(torch, adapters)
        assert torch.equal(parameter, stored["base_model.model." + name.replace(".default", "")].to(parameter.dtype))
    assert model.lm_head.weight.dtype == getattr(torch, weights)


# Which parameters


def test_trainable_adapter_is_exactly_the_parameters_of_the_adapter(base: Path, tmp_path: Path):
    adapter = write_adapter(tmp_path / "a", base, modules_to_save=["lm_head"])
    model = opened(base, adapter)
    chosen = select_trainable(model, "adapter")
    modules = [f"model.layers.{n}.{name}" for n in (0, 1) for name in ("self_attn.q_proj", "mlp.down_proj")]
    expected = {f"{name}.lora_{side}.default.weight" for name in modules for side in "AB"}
    assert set(chosen) == expected | {"lm_head.modules_to_save.default.weight"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(chosen)


def test_trainable_all_leaves_out_what_the_adapter_stands_in_for(base: Path, tmp_path: Path):
    model = opened(base, write_adapter(tmp_path / "a", base, modules_to_save=["lm_head"]))
    chosen = select_trainable(model, "all")
    assert "lm_head.original_module.weight" not in chosen
    model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == set(chosen)


def test_an_expression_chooses_among_the_parameters_of_adapter_and_model(base: Path, adapter: Path):
    model = opened(base, adapter)
    assert set(select_trainable(model, r"layers\.1\.self_attn\.q_proj")) == {
        f"model.layers.1.self_attn.q_proj.{part}.weight" for part in ("base_layer", "lora_A.default", "lora_B.default")
    }


# The gradient


def policy_of(model: Any, directory: Path, **generation: Any) -> SequenceProcessor:
    settings = GenerationSettings(**{"max_new_tokens": 10, "top_p": 0.9, "tf_batch_size": 3} | generation)
    return SequenceProcessor(model, load_tokenizer(directory), settings)


def sampled(policy: SequenceProcessor, prompts: list[str]) -> BatchedSequences:
    return policy.generate(prompts, 2, [[(1, b, g) for g in range(2)] for b in range(len(prompts))])


def gradient(policy: SequenceProcessor, trainable: str, sequences: BatchedSequences) -> Tensors:
    """Return the chosen parameters' gradients; `.grad` of all others must be empty."""
    policy.model.zero_grad(set_to_none=True)
    chosen = select_trainable(policy.model, trainable)
    ProbeComponents(policy).accumulate_sum_X(sequences, None)
    found = {name: p.grad for name, p in policy.model.named_parameters() if p.grad is not None}
    assert found.keys() == chosen.keys()
    return found


@pytest.mark.parametrize(("directory", "prompts"), [("tiny", ["abc", "f"]), ("demo", ["3+4=", "12+5="])])
def test_the_gradient_is_that_of_the_full_model_restricted_to_the_adapter(
    base: Path, tmp_path: Path, directory: str, prompts: list[str]
):
    checkpoint = base if directory == "tiny" else DEMO
    adapter = write_adapter(tmp_path / "a", checkpoint, spread=0.03)
    policy = policy_of(opened(checkpoint, adapter), checkpoint)
    sequences = sampled(policy, prompts)
    whole, alone = gradient(policy, "all", sequences), gradient(policy, "adapter", sequences)
    assert alone.keys() == adapter_parameters(policy.model) and len(whole) > len(alone) > 0
    for name, value in alone.items():
        assert value.dtype == torch.float32 and value.abs().max() > 0
        torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6 * float(whole[name].abs().max()))


def test_the_gradient_is_the_merged_models_projected_on_the_adapter(base: Path, adapter: Path, tmp_path: Path):
    policy = policy_of(opened(base, adapter, "float64"), base)
    sequences = sampled(policy, ["abc", "f", "dd"])
    ours = gradient(policy, "adapter", sequences)
    merged_dir = tmp_path / "merged"
    wrapped = peft.PeftModel.from_pretrained(load_model(base, "float64"), str(adapter))
    wrapped.merge_and_unload().save_pretrained(merged_dir)
    merged = gradient(policy_of(load_model(merged_dir, "float64"), base), "all", sequences)
    factors = {name: p.detach() for name, p in policy.model.named_parameters() if "lora_" in name}
    for name in [name for name in ours if "lora_A" in name]:
        module, scale = name.removesuffix(".lora_A.default.weight"), 6 / 3
        below, above = factors[name], factors[f"{module}.lora_B.default.weight"]
        dense = merged[f"{module}.weight"]
        torch.testing.assert_close(ours[name], scale * above.T @ dense, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(
            ours[f"{module}.lora_B.default.weight"], scale * dense @ below.T, rtol=1e-5, atol=1e-7
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_sampled_through_an_adapter_is_what_is_scored(adapter: Path, base: Path, dtype: str):
    policy = policy_of(opened(base, adapter, dtype), base)
    sequences = sampled(policy, ["abc", "f", "ddeea"])
    results = policy.teacher_force_logprobs(sequences)
    assert sequences.sample_logprobs is not None
    for b in range(3):
        for g in range(2):
            scored, outside = -results.entropies[b][g], results.outside_nucleus[b][g]
            stats = ParityStats.of(sequences.sample_logprobs[b][g], scored, outside)
            assert stats.mean_gap < (1e-5 if dtype == "float32" else 2e-2)


def test_gradients_of_an_adapter_beside_bfloat16_weights_accumulate_in_float32(base: Path, adapter: Path):
    policy = policy_of(opened(base, adapter, "bfloat16"), base)
    sequences = sampled(policy, ["abc", "f"])
    for trainable in ("adapter", "all"):
        assert {value.dtype for value in gradient(policy, trainable, sequences).values()} == {torch.float32}


# Which adapter


def test_the_fingerprint_is_of_the_two_files_that_are_loaded(adapter: Path, pristine: Path):
    before = adapter_fingerprint(pristine)
    (adapter / "trainer_state.json").write_text("{}")
    assert adapter_fingerprint(adapter) == before
    edit_json(adapter, lora_alpha=7)
    assert adapter_fingerprint(adapter) != before


def test_an_adapter_that_changed_after_inspection_is_refused(base: Path, adapter: Path):
    found = inspect_checkpoint(settings(base, adapter))
    assert len(found.adapter_fingerprint) == 64 and found.adapter == adapter.resolve()
    check_fingerprint(found.directory, found.fingerprint, found.adapter, found.adapter_fingerprint)
    edit_weights(adapter, lambda t: t[FIRST + "A.weight"].mul_(2))
    with pytest.raises(CheckpointError, match=r"^model\.adapter: .*the run measures"):
        check_fingerprint(found.directory, found.fingerprint, found.adapter, found.adapter_fingerprint)


def test_a_quick_look_takes_no_fingerprint_and_finds_the_same_faults(base: Path, adapter: Path):
    found = inspect_checkpoint(settings(base, adapter), hashed=False)
    assert (found.fingerprint, found.adapter_fingerprint) == ("", "")
    halved(adapter)
    with pytest.raises(CheckpointError, match=r"^model\.adapter: .*truncated"):
        inspect_checkpoint(settings(base, adapter), hashed=False)


def test_settings_that_say_nothing_of_the_policy_and_the_order_of_names_do_not_matter(adapter: Path, pristine: Path):
    edit_json(adapter, target_modules=["q_proj", "down_proj"], base_model_name_or_path="elsewhere", peft_version="0.1")
    before = adapter_settings(adapter)
    edit_json(adapter, target_modules=["down_proj", "q_proj"], inference_mode=False)
    assert adapter_settings(adapter) == before == adapter_settings(pristine)
    edit_json(adapter, lora_alpha=7)
    assert adapter_settings(adapter) != before


@pytest.mark.parametrize("architecture", ["llama_tied", "gemma2", "qwen2"])
def test_adapters_of_other_architectures_load(tmp_path: Path, architecture: str):
    checkpoint = save_checkpoint(tmp_path / "c", tiny_model(architecture, 16), CHARACTERS)
    assert len(adapter_parameters(opened(checkpoint, write_adapter(tmp_path / "a", checkpoint)))) == 8
