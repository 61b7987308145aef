"""How each trainer writes its checkpoints: one entry a layout, in one table.

A layout says which directories are its own, what the trainer writes last, where weights that transformers loads may
lie, and how to make them from shards. `inspection` does the rest, for all layouts alike. The standard library is enough
for all of it.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ray_probe.watch.model_files import CONFIG, INDEX, VOCABULARIES, read_integer, read_object

QUIET_S = 10.0
"""A checkpoint without a marker is finished once its files have stayed as they are for so long."""
PATIENT_S = 120.0
"""The same where the name promises a marker that does not come."""

TRACKER = "latest_checkpointed_iteration.txt"
DESTINATION = "_hf"
"""Appended to a sharded checkpoint's name, for the result of a conversion by hand."""


def _always(directory: Path) -> bool:
    return True


def _never(directory: Path) -> bool:
    return False


def _itself(directory: Path) -> Iterable[Path]:
    return [directory]


def _nothing(directory: Path, step: int | None) -> str | None:
    return None


@dataclass(frozen=True)
class Layout:
    """How one trainer writes a checkpoint.

    Attributes:
        name: of the trainer and its format.
        fits: whether a directory is of this layout; the first layout of the table that fits counts.
        unfinished: what the trainer has yet to write into a directory of this step; None: it has finished.
        models: directories inside that may hold weights for transformers, the best first.
        tokenizer: directory inside that holds the tokenizer, where it is not with the weights.
        sharded: whether it holds weights that transformers cannot load.
        convert: command that makes loadable weights, of the directory, the destination and the base model.
        source: directory that the command reads.
        advice: how to have the trainer write loadable weights, where no command makes them.
        given_up: why the trainer will never finish a directory; None: it may.
        quiet_s: how long a finished checkpoint's files must have stayed, seconds; 0 where the marker says it all.
        may_lack_marker: whether a directory may be finished without `unfinished` coming to an end.
    """

    name: str
    fits: Callable[[Path], bool]
    unfinished: Callable[[Path, int | None], str | None] = _nothing
    models: Callable[[Path], Iterable[Path]] = _itself
    tokenizer: str = ""
    sharded: Callable[[Path], bool] = _never
    convert: Callable[[Path, Path, str], str] | None = None
    source: str = ""
    advice: str = ""
    given_up: Callable[[Path], str | None] = lambda directory: None
    quiet_s: float = 0.0
    may_lack_marker: Callable[[Path], bool] = _never


def named(pattern: str) -> Callable[[Path], bool]:
    """Return a test of a directory's whole name."""
    compiled = re.compile(pattern)
    return lambda directory: compiled.fullmatch(directory.name) is not None


def step_of(directory: Path) -> int | None:
    """Return the trainer's step: the last integer of a directory's name."""
    numbers = re.findall(r"\d+", directory.name)
    return int(numbers[-1]) if numbers else None


def final_path(directory: Path) -> Path:
    """Return a directory's path once its trainer has renamed it (NeMo-RL)."""
    return directory.with_name(re.sub(r"^(?:tmp|old)_(step_\d+)$", r"\1", directory.name))


def _holds(directory: Path, *patterns: str) -> bool:
    return any(next(directory.glob(pattern), None) is not None for pattern in patterns)


def _tracked(name: str) -> Callable[[Path, int | None], str | None]:
    """Return the rule of a tracker file beside the checkpoints, written last."""

    def unfinished(directory: Path, step: int | None) -> str | None:
        newest = read_integer(directory.parent / name)
        return None if newest is not None and newest >= (step or 0) else f"{name} to say {step}"

    return unfinished


def _marked(*names: str) -> Callable[[Path, int | None], str | None]:
    """Return the rule of a file that is written last: the first that is there counts."""

    def unfinished(directory: Path, step: int | None) -> str | None:
        return None if any((directory / name).is_file() for name in names) else " or ".join(names)

    return unfinished


# transformers' Trainer and all that derive from it: TRL, Unsloth, LLaMA-Factory v0.
_TRAINER_STATE = "trainer_state.json"
_OF_A_TRAINER = (_TRAINER_STATE, "training_args.bin", "optimizer*", "scheduler.pt", "rng_state*", "global_step*",
                 "pytorch_model_fsdp_*")  # fmt: skip


def _trainer_state(directory: Path, step: int | None) -> str | None:
    state = read_object(directory / _TRAINER_STATE)
    if state is None:
        return _TRAINER_STATE
    said = state.get("global_step")
    return None if step is None or said == step else f"{_TRAINER_STATE} to say step {step} (it says {said})"


def _merge_trainer(directory: Path, to: Path, base: str) -> str:
    shards = sorted(directory.glob("pytorch_model_fsdp_*"))
    if shards:
        return f"accelerate merge-weights {shards[0]} {to}"
    return f"python {directory / 'zero_to_fp32.py'} {directory} {to} --safe_serialization"


# verl: `actor/`, with the tracker file beside the checkpoints.
_ACTOR = "actor"


def _verl_contents(directory: Path, step: int | None) -> str | None:
    return None if read_object(directory / _ACTOR / "ckpt_contents.json") else f"{_ACTOR}/ckpt_contents.json"


def _verl_models(directory: Path) -> Iterable[Path]:
    contents = (read_object(directory / _ACTOR / "ckpt_contents.json") or {}).get("contents")
    listed = [contents.get(key) for key in ("hf_model", "model")] if isinstance(contents, dict) else []
    paths = [entry["path"] for entry in listed if isinstance(entry, dict) and isinstance(entry.get("path"), str)]
    inside = [path for path in paths if not Path(path).is_absolute() and ".." not in Path(path).parts]
    return [directory / _ACTOR / path for path in dict.fromkeys([*inside, "model/huggingface"])]


def _verl_merge(backend: str) -> Callable[[Path, Path, str], str]:
    def command(directory: Path, to: Path, base: str) -> str:
        asked = f"--backend {backend} --local_dir {directory / _ACTOR} --target_dir {to}"
        return f"python -m verl.model_merger merge {asked}"

    return command


# prime-rl: STABLE is touched last; a step without it below a stable one was given up.
_STABLE = "STABLE"


def _superseded(directory: Path) -> str | None:
    own = step_of(directory)
    if own is None or (directory / _STABLE).is_file():
        return None
    stable = [step_of(marker.parent) for marker in directory.parent.glob(f"*/{_STABLE}")]
    later = [step for step in stable if step is not None and step > own]
    return f"a later broadcast, of step {min(later)}, is finished and this one is not" if later else None


# NeMo-RL: tmp_step_N is renamed to step_N; the tokenizer lies beside the weights.
def _nemo_name(directory: Path, step: int | None) -> str | None:
    return None if final_path(directory) == directory else f"its name {final_path(directory).name}"


def _nemo_models(directory: Path) -> Iterable[Path]:
    weights = directory / "policy" / "weights"
    return [weights, *sorted(path.parent for path in weights.glob(f"**/{CONFIG}"))]


def _nemo_convert(directory: Path, to: Path, base: str) -> str:
    weights = directory / "policy" / "weights"
    megatron = sorted(weights.glob("iter_*"))
    tool, flag = ("megatron", "megatron") if megatron else ("dcp", "dcp")
    place = megatron[-1] if megatron else weights
    options = f"--config {directory / 'config.yaml'} --{flag}-ckpt-path {place} --hf-ckpt-path {to}"
    return f"python examples/converters/convert_{tool}_to_hf.py {options}"


def _skyrl_policy(directory: Path, step: int | None) -> str | None:
    if (directory / "policy" / CONFIG).is_file():
        return None
    if not _holds(directory, "policy/*.pt"):
        return f"policy/{CONFIG}"
    return _tracked("latest_ckpt_global_step.txt")(directory, step)


def _tokenizer_last(directory: Path, step: int | None) -> str | None:
    there = any((directory / name).is_file() for name in VOCABULARIES)
    return None if there else "the tokenizer, which OpenRLHF writes last"


def _is_torchtitan(directory: Path) -> bool:
    dcp = _holds(directory, ".metadata", ".metadata.tmp", "*.distcp")
    return dcp or (named(r"step-\d+")(directory) and not (directory / CONFIG).exists())


def _slime_convert(directory: Path, to: Path, base: str) -> str:
    options = f"--input-dir {directory} --output-dir {to} --origin-hf-dir {base}"
    return f"python tools/convert_torch_dist_to_hf.py {options}"


def _titan_convert(directory: Path, to: Path, base: str) -> str:
    options = f"--hf_assets_path {base} --model_name NAME --model_flavor FLAVOR"
    return f"python scripts/checkpoint_conversion/convert_to_hf.py {directory} {to} {options}"


LAYOUTS = (
    Layout(
        "verl, Megatron",
        fits=lambda d: _holds(d, "actor/ckpt_contents.json", "actor/model", "actor/dist_ckpt"),
        unfinished=_verl_contents, models=_verl_models, sharded=_always, convert=_verl_merge("megatron"), source=_ACTOR,
    ),
    Layout(
        "verl, FSDP",
        fits=lambda d: (d / _ACTOR).is_dir(),
        unfinished=_tracked(TRACKER), models=lambda d: [d / _ACTOR / "huggingface"],
        sharded=_always, convert=_verl_merge("fsdp"), source=_ACTOR,
    ),
    Layout(
        "prime-rl, broadcast",
        fits=lambda d: d.parent.name == "broadcasts",
        unfinished=_marked(_STABLE), given_up=_superseded,
        advice='only the marker is there, as NCCL leaves it: set weight_broadcast.type = "filesystem"',
    ),
    Layout(
        "prime-rl, checkpoint",
        fits=lambda d: (d / "trainer").is_dir() and named(r"step_\d+")(d),
        unfinished=_marked("trainer/.metadata"), models=lambda d: [d / "weights"],
        sharded=_always, convert=lambda d, to, base: f"python tools/convert_dcp_to_bf16.py {d} {to}",
    ),
    Layout(
        "LLaMA-Factory v1",
        fits=lambda d: (d / "CHECKPOINT_COMPLETE").is_file()
        or (named(r"checkpoint-\d+")(d) and ((d / "model").is_dir() or (d / "hf_model").is_dir())),
        unfinished=_marked("CHECKPOINT_COMPLETE"), models=lambda d: [d / "hf_model", d / "model"],
        advice="its weights are sharded: set save_ckpt_as_hf",
    ),
    Layout(
        "transformers, TRL",
        fits=lambda d: (d / _TRAINER_STATE).is_file() or named(r"checkpoint-\d+")(d),
        unfinished=_trainer_state, sharded=lambda d: _holds(d, "pytorch_model_fsdp_*", "global_step*"),
        convert=_merge_trainer, may_lack_marker=lambda d: not _holds(d, *_OF_A_TRAINER),
    ),
    Layout(
        "NeMo-RL",
        fits=lambda d: (d / "training_info.json").is_file()
        or named(r"(?:tmp|old)_step_\d+")(d)
        or (named(r"step_\d+")(d) and (d / "policy").is_dir()),
        unfinished=_nemo_name, models=_nemo_models, tokenizer="policy/tokenizer",
        sharded=_always, convert=_nemo_convert,
    ),
    Layout("OpenRLHF", fits=named(r"global_step\d+_hf"), unfinished=_tokenizer_last, quiet_s=QUIET_S),
    Layout(
        "OpenRLHF, DeepSpeed",
        fits=lambda d: d.parent.name == "_actor" and named(r"global_step\d+")(d),
        models=lambda d: [], advice="it is state to resume from: set --ckpt.save_hf",
    ),
    Layout(
        "SkyRL",
        fits=lambda d: named(r"global_step_\d+")(d) and _holds(d, "policy", ".tmp-hf-export-*"),
        # An export of FSDP comes whole, by a rename; one of Megatron is written in place.
        unfinished=_skyrl_policy, models=lambda d: [d / "policy"], quiet_s=QUIET_S,
        advice="it is state to resume from: set hf_save_interval and watch export_path",
    ),
    Layout(
        "Megatron (slime)",
        fits=named(r"iter_\d{7}"), unfinished=_tracked(TRACKER), models=lambda d: [],
        sharded=_always, convert=_slime_convert,
    ),
    Layout("slime, weights on disk", fits=named(r"weight_v\d+"), unfinished=_marked(INDEX)),
    Layout(
        "torchtitan (DCP)",
        fits=_is_torchtitan, unfinished=_marked(".metadata", INDEX), quiet_s=QUIET_S,
        sharded=lambda d: _holds(d, ".metadata"), convert=_titan_convert,
    ),
    Layout(
        "torchtune",
        fits=lambda d: (d / "recipe_state.pt").is_file() or named(r"epoch_\d+")(d),
        unfinished=_marked("recipe_state.pt"), may_lack_marker=_always,
    ),
    Layout("save_pretrained", fits=_always, quiet_s=QUIET_S),
)  # fmt: skip
"""All layouts; the first that fits a directory counts."""
