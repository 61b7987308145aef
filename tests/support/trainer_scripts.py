"""One script for each layout, with a checkpoint of step 5, by the trainer and its settings."""

from support.trainers import (
    Script,
    Write,
    adapter,
    as_json,
    config,
    index,
    moved,
    removed,
    states,
    tensors,
    tokenizer,
    under,
    weights,
)

BASE = "@BASE@"
"""Stands for the base model's directory in an adapter's config; no directory has that name."""


def _trainer(shards: int = 1, trl: bool = False) -> list[list[Write]]:
    at = "checkpoint-5"
    last = [under(at, entropy_ctrl_state__json=as_json({"coefficient": 0.1}))] if trl else []
    return [config(at), *weights(at, shards), tokenizer(at), under(at, training_args__bin=b"p"), states(at),
            under(at, trainer_state__json=as_json({"global_step": 5, "log_history": []})), *last]  # fmt: skip


def _dcp(at: str, ranks: int = 2) -> list[list[Write]]:
    files = [Write(f"{at}/__{rank}_0.distcp", b"shard" * 9) for rank in range(ranks)]
    return [files, [Write(f"{at}/.metadata", b"pickled" * 9, "renamed", ".metadata.tmp")]]


def _verl(with_model: bool) -> list[list[Write]]:
    at = "global_step_5/actor"
    ranks = [Write(f"{at}/{kind}_world_size_2_rank_{rank}.pt", b"pickled" * 9)
             for kind in ("model", "optim", "extra_state") for rank in range(2)]  # fmt: skip
    own = weights(f"{at}/huggingface", 2) if with_model else []
    return [ranks, under(at, fsdp_config__json=as_json({"FSDP_version": 2})),
            [*config(f"{at}/huggingface"), *tokenizer(f"{at}/huggingface")], *own,
            [Write("global_step_5/data.pt", b"pickled")],
            [Write("latest_checkpointed_iteration.txt", b"5")]]  # fmt: skip


def _megatron(with_model: bool) -> list[list[Write]]:
    at, inside = "global_step_5/actor", "model/huggingface" if with_model else "model/dist_ckpt"
    own = [*weights(f"{at}/{inside}", 2), [*config(f"{at}/{inside}"), *tokenizer(f"{at}/{inside}")]]
    contents = {"contents": {"model": {"path": inside, "format": "any"}}, "global_step": 5}
    extra = [Write(f"{at}/extra/dist_ckpt/common.pt", b"pickled")]
    return [*(own if with_model else _dcp(f"{at}/{inside}")), extra,
            [Write(f"{at}/ckpt_contents.json", as_json(contents), "renamed", "ckpt_contents.json.tmp")],
            [Write("latest_checkpointed_iteration.txt", b"5")]]  # fmt: skip


def _broadcast(files: list[list[Write]]) -> list[list[Write]]:
    at = "broadcasts/step_5"
    return [*files, [Write(f"{at}/STABLE", b"", "at once")]]


def _nemo(with_model: bool) -> list[list[Write]]:
    at = "tmp_step_5"
    inside = f"{at}/policy/weights/consolidated"
    own = [*weights(inside, 2), config(inside)] if with_model else _dcp(f"{at}/policy/weights")
    return [[*under(at, training_info__json=as_json({"step": 5}), config__yaml=b"a: 1")], *own,
            tokenizer(f"{at}/policy/tokenizer"), [moved(at, "step_5")]]  # fmt: skip


def _slime(at: str) -> list[list[Write]]:
    names = [f"model-{k:05d}-of-00002.safetensors" for k in (1, 2)]
    shards = [Write(f"{at}/{name}", tensors(), "renamed", f"model-{k:05d}.safetensors")
              for k, name in enumerate(names, start=1)]  # fmt: skip
    return [[*config(at), *tokenizer(at)], shards, [Write(f"{at}/model.safetensors.index.json", index(*names))]]


def _openrlhf_adapter() -> list[list[Write]]:
    at = "global_step5_hf"
    return [*adapter(at, BASE), [Write(f"{at}/adapter_model.bin", b"pickled" * 9)],
            [removed(f"{at}/adapter_model.safetensors")], tokenizer(at)]  # fmt: skip


def _skyrl_export() -> list[list[Write]]:
    at = "global_step_5/.tmp-hf-export-ab12"
    return [config(at), *weights(at, 2), tokenizer(at), [moved(at, "global_step_5/policy")]]


_FSDP = [config("checkpoint-5"), *_dcp("checkpoint-5/pytorch_model_fsdp_0"), states("checkpoint-5"),
         under("checkpoint-5", trainer_state__json=as_json({"global_step": 5}))]  # fmt: skip
_ZERO = [[*config("checkpoint-5"), Write("checkpoint-5/zero_to_fp32.py", b"#"), *tokenizer("checkpoint-5")],
         [Write(f"checkpoint-5/global_step5/zero_pp_rank_{k}_model_states.pt", b"pickled") for k in range(2)],
         under("checkpoint-5", trainer_state__json=as_json({"global_step": 5}))]  # fmt: skip
_LORA = [*adapter("checkpoint-5", BASE), tokenizer("checkpoint-5"), states("checkpoint-5"),
         under("checkpoint-5", trainer_state__json=as_json({"global_step": 5}))]  # fmt: skip
_V1 = "checkpoint-5/model"
_COMPLETE = [[Write("checkpoint-5/CHECKPOINT_COMPLETE", b"", "at once")]]
_SKYRL = [[Write(f"global_step_5/policy/model_rank_{k}.pt", b"pickled") for k in range(2)],
          [*config("global_step_5/policy/huggingface"), *tokenizer("global_step_5/policy/huggingface")],
          [Write("latest_ckpt_global_step.txt", b"5")]]  # fmt: skip
_MEGATRON_SLIME = [*_dcp("iter_0000005"), [Write("iter_0000005/common.pt", b"pickled")],
                   [Write("latest_checkpointed_iteration.txt", b"5")]]  # fmt: skip
_DEEPSPEED = [[Write(f"_actor/global_step5/mp_rank_0{k}_model_states.pt", b"pickled") for k in range(2)],
              [Write("_actor/latest", b"global_step5")]]  # fmt: skip

SCRIPTS = {
    "transformers": Script("transformers, TRL", "checkpoint-5", _trainer()),
    "TRL, in two files": Script("transformers, TRL", "checkpoint-5", _trainer(2, trl=True), done=len(_trainer(2))),
    "TRL, adapter": Script("transformers, TRL", "checkpoint-5", _LORA, adapter=True),
    "transformers, FSDP shards": Script(
        "transformers, TRL", "checkpoint-5", _FSDP, "needs conversion", "accelerate merge-weights"
    ),
    "transformers, ZeRO-3": Script(
        "transformers, TRL", "checkpoint-5", _ZERO, "needs conversion", "zero_to_fp32.py"
    ),
    "LLaMA-Factory v1": Script(
        "LLaMA-Factory v1", "checkpoint-5",
        [config(_V1), *weights(_V1), tokenizer(_V1), [Write("checkpoint-5/rng.pt", b"p")], *_COMPLETE], model="model",
    ),
    "LLaMA-Factory v1, FSDP2": Script(
        "LLaMA-Factory v1", "checkpoint-5", [*_dcp(_V1), *_COMPLETE], "skipped", "save_ckpt_as_hf"
    ),
    "LLaMA-Factory v1, as hf": Script(
        "LLaMA-Factory v1", "checkpoint-5",
        [*_dcp(_V1), config("checkpoint-5/hf_model"), *weights("checkpoint-5/hf_model", 2),
         tokenizer("checkpoint-5/hf_model"), *_COMPLETE], model="hf_model",
    ),
    "verl": Script(
        "verl, FSDP", "global_step_5", _verl(False), "needs conversion", "verl.model_merger merge --backend fsdp"
    ),
    "verl, hf_model": Script("verl, FSDP", "global_step_5", _verl(True), model="actor/huggingface"),
    "verl, Megatron": Script(
        "verl, Megatron", "global_step_5", _megatron(True), model="actor/model/huggingface",
        done=len(_megatron(True)) - 1,
    ),
    "verl, Megatron shards": Script(
        "verl, Megatron", "global_step_5", _megatron(False), "needs conversion", "--backend megatron",
        done=len(_megatron(False)) - 1,
    ),
    "prime-rl broadcast": Script(
        "prime-rl, broadcast", "broadcasts/step_5",
        _broadcast([[Write("broadcasts/step_5/model.safetensors", tensors(), "renamed", "tmp-rank0.safetensors")]]),
        needs_base=True,
    ),
    "prime-rl broadcast, adapter": Script(
        "prime-rl, broadcast", "broadcasts/step_5", _broadcast(adapter("broadcasts/step_5", BASE)), adapter=True
    ),
    "prime-rl broadcast, NCCL": Script(
        "prime-rl, broadcast", "broadcasts/step_5", _broadcast([]), "skipped", "weight_broadcast.type"
    ),
    "prime-rl checkpoint": Script(
        "prime-rl, checkpoint", "checkpoints/step_5", _dcp("checkpoints/step_5/trainer"), "needs conversion",
        "tools/convert_dcp_to_bf16.py",
    ),
    "SkyRL export": Script("SkyRL", "global_step_5", _skyrl_export(), model="policy", quiet=True),
    "SkyRL export, Megatron": Script(
        "SkyRL", "global_step_5",
        [tokenizer("global_step_5/policy"), *weights("global_step_5/policy", 2), config("global_step_5/policy")],
        model="policy", quiet=True,
    ),
    "SkyRL": Script("SkyRL", "global_step_5", _SKYRL, "skipped", "export_path", quiet=True),
    "OpenRLHF": Script(
        "OpenRLHF", "global_step5_hf",
        [*weights("global_step5_hf", 2), config("global_step5_hf"), tokenizer("global_step5_hf")], quiet=True,
    ),
    "OpenRLHF, adapter": Script(
        "OpenRLHF", "global_step5_hf", _openrlhf_adapter(), "skipped", "pickle", quiet=True
    ),
    "OpenRLHF, DeepSpeed": Script(
        "OpenRLHF, DeepSpeed", "_actor/global_step5", _DEEPSPEED, "skipped", "--ckpt.save_hf", done=1
    ),
    "NeMo-RL": Script("NeMo-RL", "step_5", _nemo(False), "needs conversion", "convert_dcp_to_hf.py"),
    "NeMo-RL, consolidated": Script("NeMo-RL", "step_5", _nemo(True), model="policy/weights/consolidated"),
    "slime, save-hf": Script("save_pretrained", "hf/5", _slime("hf/5"), quiet=True),
    "slime, weights on disk": Script("slime, weights on disk", "weight_v000005", _slime("weight_v000005")),
    "slime, Megatron": Script(
        "Megatron (slime)", "iter_0000005", _MEGATRON_SLIME, "needs conversion", "tools/convert_torch_dist_to_hf.py"
    ),
    "torchtitan": Script(
        "torchtitan (DCP)", "checkpoint/step-5", _dcp("checkpoint/step-5"), "needs conversion",
        "checkpoint_conversion/convert_to_hf.py", quiet=True,
    ),
    "torchtitan, last": Script(
        "torchtitan (DCP)", "checkpoint/step-5", weights("checkpoint/step-5", 2), needs_base=True, quiet=True
    ),
    "torchtune": Script(
        "torchtune", "epoch_5",
        [config("epoch_5"), *weights("epoch_5", 2, "in place"), tokenizer("epoch_5"),
         [Write("epoch_5/recipe_state.pt", b"pickled", "at once")]],  # its bytes do not matter
    ),
    "save_pretrained": Script(
        "save_pretrained", "my-run-5", [config("my-run-5"), *weights("my-run-5", 3), tokenizer("my-run-5")], quiet=True
    ),
    "save_pretrained, older safetensors": Script(
        "save_pretrained", "step-5", [config("step-5"), *weights("step-5", 2, "in place"), tokenizer("step-5")],
        quiet=True,
    ),
}  # fmt: skip
"""By trainer."""
