"""A model is tried at load: abilities of its cache, and whether to refuse it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.adapters import write_adapter
from support.architectures import tiny
from support.models import character_tokenizer, probe_config, save_checkpoint
from support.reference import Gaps, worst_gaps
from support.runs import processor_of
from support.workers import InProcessWorkers
from transformers import BertConfig, DynamicCache, cache_utils

from ray_probe.checkpoints.load import load_model
from ray_probe.config import GenerationSettings
from ray_probe.controller.measurement import Job, measure
from ray_probe.core.estimator.parity import TOLERANCE_NATS
from ray_probe.errors import CheckpointError, ParityError
from ray_probe.model import trials
from ray_probe.model.forward import Forward
from ray_probe.rollout.builder import build_rollout
from ray_probe.run.preparation.prepare import prepare
from ray_probe.sequence_processor import SequenceProcessor

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
PROMPTS = ["a", "bcd", "ABCDEFGHIJ", "hello0world9xyz"]
ENDS = (0, 3, 9, 17, 33, 41)  # several, so that rows end at different steps
FULL_AFTER_LINEAR = {"layer_types": ["linear_attention", "full_attention"]}


def policy(model: Any, **generation: Any) -> SequenceProcessor:
    settings = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 16, "eos_token_ids": ENDS} | generation
    return SequenceProcessor(model, character_tokenizer(CHARACTERS), GenerationSettings(**settings))


def gaps(model: Any, **generation: Any) -> Gaps:
    return worst_gaps(policy(model, **generation), PROMPTS)


def worst(found: Gaps) -> float:
    return max(found.scored, found.entropy, found.sampled)


# Caches whose rows cannot be taken out


@pytest.mark.parametrize("name", ["minimax", "deepseek_v4", "llama", "gemma2", "deepseek_v3"])
def test_rows_that_end_at_different_steps_leave_the_cache_where_it_lets_them(name: str):
    processor = policy(tiny(name))
    assert processor.forward.drops_rows == (name not in ("minimax", "deepseek_v4"))
    assert worst(worst_gaps(processor, PROMPTS)) < 1e-4


def test_a_cache_whose_rows_are_taken_out_wrongly_keeps_them(monkeypatch: pytest.MonkeyPatch):
    def first_rows(self: Any, indices: torch.Tensor) -> None:
        self.keys, self.values = self.keys[: len(indices)], self.values[: len(indices)]

    monkeypatch.setattr(cache_utils.DynamicLayer, "batch_select_indices", first_rows)
    processor = policy(tiny("llama"))
    assert not processor.forward.drops_rows
    assert worst(worst_gaps(processor, PROMPTS)) < 1e-4


def test_only_plain_tables_of_keys_and_values_count_as_rows():
    class OwnLayer(cache_utils.DynamicLayer):
        pass

    class OwnCache(DynamicCache):
        pass

    plain = DynamicCache()
    plain.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    own = OwnCache()
    own.update(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), 0)
    assert trials.can_select(plain)
    assert not trials.can_select(own) and not trials.can_select(cache_utils.Cache(layers=[OwnLayer()]))


# Caches that differ from one pass


@pytest.mark.parametrize("name", ["nemotron_h", "zamba2"])
def test_a_hybrid_whose_cache_differs_is_refused_with_the_measured_gap_or_runs_where_that_is_allowed(name: str):
    model = tiny(name)
    gap = Forward(model).cache_gap
    assert 1e-4 < gap < 1.0  # 6e-4 and 5e-3 with transformers 5.23, 0.2 and 0.6 with 5.10
    with pytest.raises(ParityError, match=r"^generation\.parity_tolerance: got .* nats; steps of .*") as caught:
        policy(model, parity_tolerance=0.9 * gap)
    assert f"are {gap:.2g} nats a token" in str(caught.value) and caught.value.exit_code == 5
    found = gaps(model, parity_tolerance=1.1 * gap)
    assert max(found.scored, found.entropy) < 1e-4, "what is scored is right"
    assert gap / 10 < found.parity < gap * 10, "the trial measures what the gate will see"


def test_a_run_says_at_its_start_what_gap_was_found_and_goes_on_where_the_gate_allows_it(tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path / "c", tiny("nemotron_h"), CHARACTERS)
    config = probe_config(
        checkpoint, data={"prompts": PROMPTS}, output={"dir": str(tmp_path / "runs"), "name": "run"},
        batch={"prompts_per_round": 4, "responses_per_prompt": 2, "shard_prompts": 2, "rounds": 1},
        generation={"max_new_tokens": 8, "eos_token_ids": list(ENDS), "parity_tolerance": 1.0},
    )  # fmt: skip
    told: list[str | None] = []
    workers = InProcessWorkers()
    measure(Job(prepare(config), resume=False), workers, lambda progress: told.append(progress.note), lambda: False)
    gap = workers.info.cache_gap
    warning = f"warning: steps from this model's cache are {gap:.2g} nats a token from one pass over them"
    assert gap > 1e-4 and warning in told and warning in (tmp_path / "runs" / "run" / "log.txt").read_text()


def test_a_cache_that_is_wrong_beyond_its_window_is_refused():
    with pytest.raises(ParityError, match=r"steps of MiniMaxForCausalLM from its key-value cache are \d(\.\d)? nats"):
        policy(tiny("minimax", sliding_window=6, **FULL_AFTER_LINEAR))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["llama", "gemma2", "falcon_h1", "gpt_neox"])
def test_rounding_is_no_gap(name: str, dtype: torch.dtype):
    assert Forward(tiny(name).to(dtype)).cache_gap == 0.0


def test_rounding_of_many_layers_in_bfloat16_is_no_gap_though_it_passes_the_gates_tolerance():
    model = tiny("llama", spread=0.1, hidden_size=128, num_hidden_layers=24, vocab_size=1000)
    model.lm_head.weight.data.normal_(0, 0.5)
    forward = Forward(model.to(torch.bfloat16))
    assert forward.cache_gap == 0.0 and forward.takes_padding and forward.drops_rows
    with torch.no_grad():
        trial = trials.Trial(forward)
        log_p_LV = torch.log_softmax(trial.whole_LV[trial.half :].double(), -1)
        gap_LV = (torch.log_softmax(trial.stepped(trial.ids_L).double(), -1) - log_p_LV).abs()
        assert float((log_p_LV.exp() * gap_LV).sum(-1).mean()) > TOLERANCE_NATS["bfloat16"]


def test_the_allowed_gap_is_the_gates(monkeypatch: pytest.MonkeyPatch):
    forward = Forward(tiny("llama"))
    for dtype, allowed in TOLERANCE_NATS.items():
        forward.model.to(getattr(torch, dtype))
        for gap, tolerance, refused in ((0.9, None, False), (1.1, None, True), (1.1, 2 * allowed, False)):
            forward.cache_gap = gap * allowed
            if refused:
                with pytest.raises(ParityError):
                    trials.check_cache_gap(forward, tolerance)
            else:
                trials.check_cache_gap(forward, tolerance)


# Models that are refused


def test_a_model_that_sees_later_tokens_is_refused_as_no_causal_language_model():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    assert BertConfig(**sizes).is_decoder is False
    with pytest.raises(CheckpointError, match=r"^model\.path: got 'BertLMHeadModel'; need a causal language model"):
        policy(tiny("bert", is_decoder=False))
    with pytest.raises(CheckpointError, match="an encoder or embedding model"):
        policy(tiny("gemma3_text", use_bidirectional_attention=True))


class Company(torch.nn.Module):
    """Logits that depend on how many rows there are."""

    def __init__(self, embedding: torch.nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.embedding(ids)
        return hidden * (1 + 0.1 * len(ids))


def test_a_model_whose_rows_depend_on_their_company_is_refused():
    model = tiny("gpt2")
    model.transformer.wte = Company(model.transformer.wte)
    model.get_input_embeddings = lambda: model.transformer.wte.embedding
    with pytest.raises(CheckpointError, match=r"takes each row by itself: beside another, its logits are 0"):
        policy(model)


def test_what_transformers_raises_in_a_step_is_told_in_one_line_before_anything_is_sampled():
    recurrent = {"layer_types": ["linear_attention", "linear_attention"]}
    with pytest.raises(CheckpointError, match=r"a step from its key-value cache fails in transformers \(") as caught:
        policy(tiny("qwen3_next", **recurrent))
    assert "\n" not in str(caught.value)


def test_a_device_that_is_full_says_nothing_about_the_model(monkeypatch: pytest.MonkeyPatch):
    def full(*args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    forward = Forward(tiny("llama"))
    monkeypatch.setattr(forward, "step", full)
    with pytest.raises(torch.OutOfMemoryError):
        trials.try_model(forward)


# Outputs that a config turns on

OUTPUTS = {
    "output_router_logits": "router_logits", "output_hidden_states": "hidden_states", "output_attentions": "attentions",
}  # fmt: skip


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("plain_head", [True, False])
def test_outputs_that_a_config_turns_on_are_turned_off_in_every_call(
    output: str, plain_head: bool, monkeypatch: pytest.MonkeyPatch
):
    model = tiny("mixtral")
    model.set_attn_implementation("eager")
    setattr(model.config, output, True)
    if not plain_head:
        monkeypatch.setattr("ray_probe.model.forward.find_head", lambda model: (None, "not taken apart"))
    processor, seen = policy(model), []
    model.model.register_forward_hook(lambda module, inputs, result: seen.append(result))
    sequences = processor.generate(PROMPTS, 1, [[0], [1], [2], [3]])
    processor.teacher_force_logprobs(sequences)
    assert len(seen) > 2 and all(getattr(result, OUTPUTS[output], None) is None for result in seen)
    assert getattr(model.model(input_ids=torch.tensor([[1, 2]])), OUTPUTS[output]) is not None, "a control"
    assert worst(gaps(model)) < 1e-4


@pytest.mark.parametrize("name", ["bloom", "falcon"])
def test_outputs_without_names_get_theirs(name: str):
    assert worst(gaps(tiny(name, return_dict=False))) < 1e-4


def test_a_mixture_of_experts_runs_in_float64(tmp_path: Path):
    checkpoint = save_checkpoint(tmp_path / "c", tiny("mixtral"), CHARACTERS)
    assert worst(gaps(load_model(checkpoint, "float64"))) < 1e-9


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # peft asks transformers
@pytest.mark.parametrize(
    ("name", "lora", "dtype"),
    [
        ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "float32"),
        ("mixtral", {"target_modules": ["q_proj", "lm_head"]}, "bfloat16"),
        ("qwen3_moe", {"target_modules": ["q_proj", "lm_head"], "use_dora": True}, "float32"),
    ],
)
def test_a_mixture_of_experts_with_its_auxiliary_loss_runs_with_any_head(
    tmp_path: Path, name: str, lora: dict[str, Any], dtype: str
):
    checkpoint = save_checkpoint(tmp_path / "c", tiny(name, output_router_logits=True), CHARACTERS)
    adapter = write_adapter(tmp_path / "a", checkpoint, **lora)
    chosen = {"adapter": str(adapter), "trainable": "adapter", "dtype": dtype}
    config = probe_config(checkpoint, model=chosen, data={"prompts": PROMPTS}, generation={"eos_token_ids": list(ENDS)})
    processor = processor_of(build_rollout(config, checkpoint, "policy"))
    assert processor.forward.head is None
    found = worst_gaps(processor, PROMPTS)
    assert found.parity < TOLERANCE_NATS[dtype] and (dtype == "bfloat16" or worst(found) < 1e-4)
