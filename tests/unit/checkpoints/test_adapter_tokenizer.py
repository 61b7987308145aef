"""An adapter's tokenizer, EOS and chat template precede those of its base."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.adapters import write_adapter
from support.jobs import job_on, write_jsonl
from support.models import character_tokenizer, save_checkpoint, tiny_llama
from support.runs import processor_of

from ray_probe.checkpoints.fingerprint import adapter_fingerprint, check_fingerprint
from ray_probe.checkpoints.inspection import inspect_checkpoint
from ray_probe.checkpoints.node_cache import node_copy
from ray_probe.config.schema import ModelConfig, ProbeConfig
from ray_probe.controller.run_log import log_text, logged_to
from ray_probe.errors import CheckpointError, ConfigError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.rollout.builder import RolloutBuilder, build_rollout
from ray_probe.run.manifest import Manifest, check_same_inputs
from ray_probe.run.messages import ActorFacts
from ray_probe.run.preparation.prepare import prepare

CHARACTERS = "abcdefghijklmnopqrstuvwxyz"
ROWS = len(CHARACTERS) + 2
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
ACTOR = ActorFacts(ParameterLayout((), ()), "cpu", 1, 10**9)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base `c` and a LoRA `a` on it."""
    directory = tmp_path_factory.mktemp("pristine")
    base = save_checkpoint(directory / "c", tiny_llama(ROWS), CHARACTERS)
    write_adapter(directory / "a", base)
    return directory


@pytest.fixture
def adapter(pristine: Path, tmp_path: Path) -> Path:
    for name in ("c", "a"):
        shutil.copytree(pristine / name, tmp_path / name)
    return tmp_path / "a"


def write_tokenizer(directory: Path, eos: str = "<eos>", template: str | None = None, characters: str = CHARACTERS):
    tokenizer = character_tokenizer(characters)
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    tokenizer.save_pretrained(directory)


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | changes))


def a_job(adapter: Path, **sections: Any) -> ProbeConfig:
    prompts = write_jsonl(adapter.parent / "p.jsonl", [{"prompt": text} for text in ("abc", "dq", "u", "klmn")])
    model = {"adapter": str(adapter), "trainable": "adapter"}
    return job_on(adapter.parent / "c", prompts)(model=model, **sections)


def inspected(adapter: Path) -> Any:
    settings = ModelConfig(path=str(adapter.parent / "c"), adapter=str(adapter))
    return inspect_checkpoint(settings, hashed=False)


def ends(adapter: Path) -> tuple[tuple[int, ...], str]:
    eos = inspected(adapter).eos(None)
    return eos.ids, eos.source


# EOS


def test_responses_end_at_the_eos_of_the_adapters_tokenizer(adapter: Path):
    write_tokenizer(adapter, eos="z")
    rollout = build_rollout(a_job(adapter), adapter.parent / "c", "policy")
    assert rollout.eos_ids == (26,)
    eos = inspected(adapter).eos(None)
    assert eos.line() == "26 'z' (adapter's tokenizer)"
    assert eos.differences() == "generation_config.json, config.json, tokenizer name 0 '<eos>'"


def test_the_adapters_generation_config_comes_first(adapter: Path):
    write_tokenizer(adapter, eos="z")
    edit_json(adapter / "generation_config.json", eos_token_id=[5, 4])
    assert ends(adapter) == ((4, 5), "adapter's generation_config.json")


def test_a_mere_copy_of_the_bases_tokenizer_leaves_all_ids_of_its_generation_config(adapter: Path):
    edit_json(adapter.parent / "c" / "generation_config.json", eos_token_id=[0, 7])
    write_tokenizer(adapter)
    assert ends(adapter) == ((0, 7), "generation_config.json")


def test_a_base_without_a_tokenizer_takes_the_adapters(adapter: Path):
    for file in (adapter.parent / "c").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CheckpointError, match=r"^model\.path: .*it has no tokenizer; put tokenizer\.json"):
        inspected(adapter)
    write_tokenizer(adapter, eos="z")
    assert ends(adapter)[0] == (26,)
    build_rollout(a_job(adapter), adapter.parent / "c", "policy")


def test_a_swapped_adapter_brings_its_own_end(adapter: Path, tmp_path: Path):
    other = Path(shutil.copytree(adapter, tmp_path / "b"))
    write_tokenizer(other, eos="z")
    live, base = RolloutBuilder(), adapter.parent / "c"
    assert live.load(a_job(adapter), base, adapter, "policy").eos_ids == (0,)
    assert live.load(a_job(other), base, other, "policy").eos_ids == (26,)
    assert live.way == "swapped"


# Prompts


def test_prompts_are_tokenized_and_rendered_by_the_adapter(adapter: Path):
    write_tokenizer(adapter.parent / "c", template="no{{ messages[0].content }}")
    write_tokenizer(adapter, template=TEMPLATE, characters=CHARACTERS[::-1])
    prepared = prepare(a_job(adapter, data={"chat_template": True}))
    assert prepared.plan.texts[0] == "abc"
    processor = processor_of(build_rollout(prepared.config, adapter.parent / "c", "policy"))
    assert processor.encode("abc") == [26, 25, 24]
    checkpoint = written(prepared)["checkpoint"]
    assert (checkpoint["tokenizer_from"], checkpoint["chat_template_from"]) == ("model.adapter", "model.adapter")


def test_the_log_says_whose_tokenizer_and_template_are_in_use(adapter: Path, tmp_path: Path):
    write_tokenizer(adapter, eos="z")
    with logged_to(tmp_path / "log.txt"):
        log_text(prepare(a_job(adapter)))
    lines = [line.split(" ", 3)[3] for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert lines == [
        "tokenizer from model.adapter, chat template from neither",
        "responses end at 26 'z' (adapter's tokenizer)",
        "generation_config.json, config.json, tokenizer name 0 '<eos>'; not used, generation.eos_token_ids decides",
    ]


def test_a_chat_template_alone_is_taken_too(adapter: Path):
    with pytest.raises(ConfigError, match=r"^data\.chat_template: got True; the tokenizer has no default chat"):
        prepare(a_job(adapter, data={"chat_template": True}))
    (adapter / "chat_template.jinja").write_text(TEMPLATE)
    found = inspected(adapter).policy_tokenizer
    assert (found.tokenizer_from, found.template_from) == ("model.path", "model.adapter")
    assert prepare(a_job(adapter, data={"chat_template": True})).plan.texts[0] == "abc"


def test_an_adapters_tokenizer_without_a_template_keeps_that_of_its_base(adapter: Path):
    write_tokenizer(adapter.parent / "c", template=TEMPLATE)
    write_tokenizer(adapter, eos="z")
    found = inspected(adapter).policy_tokenizer
    assert (found.tokenizer_from, found.template_from) == ("model.adapter", "model.path")
    assert found.tokenizer.get_chat_template() == TEMPLATE


# What is refused


def refused(adapter: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        inspected(adapter)
    message = str(caught.value)
    assert message.startswith(f"model.adapter: got '{adapter}'"[:80]) and "\n" not in message
    return message


def test_ids_that_the_model_has_no_row_for_are_refused(adapter: Path):
    write_tokenizer(adapter, characters=CHARACTERS + "XYZ")
    says = "its tokenizer has ids up to 30, the embeddings have 28 rows (28 'Y', 29 'Z', 30 '<pad>')"
    assert says in refused(adapter)


def test_an_eos_that_the_model_has_no_row_for_is_refused(adapter: Path):
    edit_json(adapter / "generation_config.json", eos_token_id=[0, 28])
    with pytest.raises(CheckpointError, match=r"^eos_token_id: got \[0, 28\]; adapter's generation_config\.json"):
        prepare(a_job(adapter))


def test_remote_code_of_the_tokenizer_is_refused(adapter: Path):
    write_tokenizer(adapter)
    edit_json(adapter / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Tokenizer", None]})
    assert "remote code (auto_map)" in refused(adapter)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: (path / "tokenizer.json").unlink(), "it has tokenizer_config.json and no tokenizer; copy"),
        (lambda path: (path / "tokenizer.json").write_text("{"), "its tokenizer cannot be loaded ("),
        (lambda path: (path / "tokenizer_config.json").write_text("["), "tokenizer_config.json cannot be read as JSON"),
        (lambda path: (path / "generation_config.json").write_text("["), "generation_config.json cannot be read as"),
    ],
    ids=["half of it", "damaged", "damaged settings", "damaged generation settings"],
)
def test_a_half_written_tokenizer_is_refused(adapter: Path, spoil: Any, says: str):
    write_tokenizer(adapter)
    spoil(adapter)
    assert says in refused(adapter)


def test_a_template_that_is_no_text_is_refused(adapter: Path):
    (adapter / "chat_template.jinja").write_bytes(b"\xff\xfe")
    assert "chat_template.jinja cannot be read" in refused(adapter)


# Fingerprints


def written(prepared: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(Manifest.of(prepared, ACTOR, {}).to_json()))
    return found


@pytest.mark.parametrize(
    "file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
def test_a_run_may_not_go_on_once_a_file_that_decides_has_changed(adapter: Path, file: str):
    write_tokenizer(adapter, template=TEMPLATE)
    edit_json(adapter / "generation_config.json", eos_token_id=0)
    before = prepare(a_job(adapter))
    check_same_inputs(prepare(a_job(adapter)), Manifest.from_json(written(before)))
    with (adapter / file).open("a") as stream:
        stream.write("\n")
    with pytest.raises(ConfigError, match=r"^model\.adapter: got .*; its content was "):
        check_same_inputs(prepare(a_job(adapter)), Manifest.from_json(written(before)))
    checkpoint = before.checkpoint
    with pytest.raises(CheckpointError, match=r"^model\.adapter: "):
        check_fingerprint(checkpoint.directory, checkpoint.fingerprint, adapter, checkpoint.adapter_fingerprint)


def test_what_trainers_leave_beside_an_adapter_does_not_count(adapter: Path):
    before = adapter_fingerprint(adapter)
    for name in ("trainer_state.json", "optimizer.pt", "README.md", "training_args.bin"):
        (adapter / name).write_text("x")
    assert adapter_fingerprint(adapter) == before


def test_a_nodes_copy_has_the_tokenizer_too(adapter: Path, tmp_path: Path):
    write_tokenizer(adapter, eos="z", template=TEMPLATE)
    found = prepare(a_job(adapter)).checkpoint
    copy = node_copy(str(tmp_path / "cache"), found.directory, found.fingerprint, adapter, found.adapter_fingerprint)
    assert copy.adapter is not None and {"tokenizer.json", "chat_template.jinja"} <= set(os.listdir(copy.adapter))
    live = RolloutBuilder().load(a_job(adapter), copy.directory, copy.adapter, "policy")
    assert live.eos_ids == (26,)
    copy.release()


def test_a_run_that_began_under_another_end_may_not_go_on(adapter: Path):
    """As after an update of ray_probe that chooses among the sources by another rule."""
    prepared = prepare(a_job(adapter))
    earlier = written(prepared) | {"eos_token_ids": [0, 128001, 128009]}
    says = r"^generation\.eos_token_ids: got \[0\]; its content was \[0, 128001, 128009\] when the run was started"
    with pytest.raises(ConfigError, match=says):
        check_same_inputs(prepared, Manifest.from_json(earlier))
