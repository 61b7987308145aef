"""What the model sees of a prompt: the chat template's text and its tokens, and never two BOS."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from support.jobs import BOS, CHAT_VOCABULARY, TEMPLATE, chat_checkpoint, chat_tokenizer, job_on, write_jsonl
from support.models import tiny_gpt2
from tokenizers.processors import TemplateProcessing

from ray_probe import sequence_processor
from ray_probe.config import GenerationSettings
from ray_probe.data.chat_template import ChatTemplate
from ray_probe.data.prompts import load_prompts
from ray_probe.data.tokenization import begins_with_two_bos, encode_prompts
from ray_probe.errors import ConfigError, InputError, PromptsError
from ray_probe.rollout.builder import build_rollout
from ray_probe.run.preparation.prepare import prepare
from ray_probe.run.preparation.prepared import PreparedRun
from ray_probe.sequence_processor import SequenceProcessor

SECRET = "attack at dawn"
SOME_DAY = datetime(2026, 3, 1, tzinfo=UTC)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


CHATS = {
    "a string": " why so ",
    "one turn": [user("why so")],
    "system and turns": [
        {"role": "system", "content": ""}, user("why"), {"role": "assistant", "content": "so"}, user("and then"),
    ],
    "other key order, null keys": [{"content": "why", "name": None, "role": "user", "tool_calls": None}],
}  # fmt: skip


def prepared_chat(directory: Path, prompts: list[Any], tokenizer: Any = None, **sections: Any) -> PreparedRun:
    """A job with `data.chat_template: true` on prompts of a file, made in the directory."""
    checkpoint = chat_checkpoint(directory / "c", tokenizer or chat_tokenizer())
    file = write_jsonl(directory / "p.jsonl", [{"prompt": prompt} for prompt in prompts])
    data = {"chat_template": True} | sections.pop("data", {})
    return prepare(job_on(checkpoint, file)(data=data, **sections))


def processor(tokenizer: Any, chat: bool) -> SequenceProcessor:
    settings = GenerationSettings(max_new_tokens=4)
    return SequenceProcessor(tiny_gpt2(CHAT_VOCABULARY, positions=64), tokenizer, settings, chat=chat)


def sampled_from(policy: SequenceProcessor, text: str) -> list[int]:
    """Ids of the prompt as they stand before a sampled response."""
    prompt, _ = policy.generate([text], 1, [[0]]).tokens(0, 0)
    return prompt.tolist()


def conversation(prompt: Any) -> list[dict[str, str]]:
    return [user(prompt)] if isinstance(prompt, str) else prompt


# Rendered prompts


@pytest.mark.parametrize("adds_bos", [True, False], ids=["adds BOS", "adds none"])
@pytest.mark.parametrize("prompt", CHATS.values(), ids=CHATS)
def test_what_is_sampled_from_is_what_apply_chat_template_gives(tmp_path: Path, prompt: Any, adds_bos: bool):
    tokenizer = chat_tokenizer(adds_bos)
    (text,) = prepared_chat(tmp_path, [prompt], tokenizer).plan.texts
    expected = tokenizer.apply_chat_template(conversation(prompt), add_generation_prompt=True)["input_ids"]
    assert sampled_from(processor(tokenizer, chat=True), text) == expected
    assert expected.count(tokenizer.bos_token_id) == 1
    assert text.endswith("<|assistant|>")


@pytest.mark.parametrize("chat", [True, False])
def test_a_rollout_samples_from_the_ids_that_the_preflight_measured(tmp_path: Path, monkeypatch, chat: bool):
    prepared = prepared_chat(tmp_path, ["why", "so"], data={"chat_template": chat}, batch={"prompts_per_round": 2})
    seen: list[list[int]] = []

    def spied(*args: Any) -> list[list[int]]:
        seen.extend(encode_prompts(*args))
        return seen

    monkeypatch.setattr(sequence_processor, "encode_prompts", spied)
    (shard,) = prepared.plan.round(0)
    build_rollout(prepared.config, prepared.checkpoint.directory, prepared.policy_id).collect(shard)
    assert seen == encode_prompts(chat_tokenizer(), [ref.text for ref in shard.prompts], chat)


def test_a_string_is_one_user_turn(tmp_path: Path):
    first, second = prepared_chat(tmp_path, ["why", [user("why")]]).plan.texts
    assert first == second == f"{BOS}<|user|>why<|end|><|assistant|>"


def test_what_is_measured_is_what_is_sampled_from(tmp_path: Path):
    length = len(chat_tokenizer().apply_chat_template([user("why")], add_generation_prompt=True)["input_ids"])
    prepared_chat(tmp_path, ["why"], data={"max_prompt_tokens": length})
    with pytest.raises(PromptsError, match=rf"p\.jsonl:1: the prompt has {length} tokens"):
        prepared_chat(tmp_path, ["why"], data={"max_prompt_tokens": length - 1})


def test_the_default_of_several_templates_is_used(tmp_path: Path):
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ raise_exception('no') }}"}
    assert prepared_chat(tmp_path, ["why"], chat_tokenizer(template=templates)).plan.texts == ("why",)


def test_the_prompts_keep_their_fingerprint_whatever_template_they_go_through(tmp_path: Path):
    other = prepared_chat(tmp_path / "a", ["why"], chat_tokenizer(template="{{ messages[0].content }}"))
    one = prepared_chat(tmp_path / "b", ["why"])
    plain = prepared_chat(tmp_path / "d", ["why"], data={"chat_template": False})
    assert one.prompts.sha256 == other.prompts.sha256 == plain.prompts.sha256
    assert one.policy_id == plain.policy_id != other.policy_id  # the template is a file of the checkpoint
    assert one.prompts.rendered_sha256 != other.prompts.rendered_sha256
    assert plain.prompts.rendered_sha256 is None


@pytest.mark.parametrize("call", ['strftime_now("%d %b %Y")', "strftime_now( '%d %b %Y' )"])
def test_a_template_that_writes_today_writes_the_day_on_which_the_run_was_created(call: str):
    today = "{% if strftime_now is defined %}{% set day = " + call + " %}{% endif %}{{ day }} {{ messages[0].content }}"
    assert ChatTemplate(chat_tokenizer(template=today), SOME_DAY)("why", "p:1") == "01 Mar 2026 why"


# BOS


@pytest.mark.parametrize(("chat", "adds_bos", "text", "bos"), [
    (False, True, "why", 1), (False, True, f"{BOS}why", 1), (False, False, "why", 0), (False, False, f"{BOS}why", 1),
    (True, True, "why", 0), (True, True, f"{BOS}why", 1), (True, False, f"{BOS}why", 1),
])  # fmt: skip
def test_a_prompt_has_its_own_bos_or_the_tokenizers_and_never_both(chat: bool, adds_bos: bool, text: str, bos: int):
    tokenizer = chat_tokenizer(adds_bos)
    ids = sampled_from(processor(tokenizer, chat), text)
    assert ids.count(tokenizer.bos_token_id) == bos
    assert not begins_with_two_bos(tokenizer, ids)
    assert tokenizer.decode(ids).endswith("why")


def test_an_end_that_the_tokenizer_adds_stays_where_its_bos_is_left_out():
    tokenizer = chat_tokenizer()
    around = tokenizer.backend_tokenizer.post_processor
    around = type(around)(single=f"{BOS} $A <eos>", special_tokens=[(BOS, tokenizer.bos_token_id), ("<eos>", 0)])
    tokenizer.backend_tokenizer.post_processor = around
    (plain,), (own,) = (encode_prompts(tokenizer, [text], chat=False) for text in ("why", f"{BOS}why"))
    assert plain == own == [tokenizer.bos_token_id, *plain[1:-1], 0]


def test_prompts_encode_alike_alone_and_together():
    tokenizer, texts = chat_tokenizer(), ["why", f"{BOS}so", "a much longer one"]
    assert encode_prompts(tokenizer, texts, False) == [encode_prompts(tokenizer, [t], False)[0] for t in texts]


def test_a_prompt_that_writes_bos_twice_itself_is_refused_before_the_run_and_by_the_processor(tmp_path: Path):
    config = {"prompts": ["why", f"{BOS}{BOS}why"], "chat_template": False}
    with pytest.raises(PromptsError, match=r"^data\.prompts\[1\]: the prompt begins with two BOS tokens; write one"):
        prepared_chat(tmp_path, ["x"], data=config)
    with pytest.raises(PromptsError, match=r"^prompt 0: begins with two BOS tokens"):
        processor(chat_tokenizer(), chat=True).generate([f"{BOS}{BOS}why"], 1, [[0]])


def test_a_message_that_begins_with_bos_went_through_a_template_already(tmp_path: Path):
    with pytest.raises(PromptsError, match=r"p\.jsonl:2: a message begins with the BOS token; set data\.chat_template"):
        prepared_chat(tmp_path, ["why", f"{BOS}<|user|>{SECRET}<|end|><|assistant|>"])


# EOS


def ending(single: str) -> Any:
    """The tokenizer with special tokens around a text as its post-processor adds them."""
    tokenizer = chat_tokenizer(adds_bos=False)
    marks = [("<eos>", 0), (BOS, tokenizer.bos_token_id)]
    added = TemplateProcessing(single=single, special_tokens=[mark for mark in marks if mark[0] in single])
    tokenizer.backend_tokenizer.post_processor = added
    return tokenizer


@pytest.mark.parametrize("single", ["$A <eos>", f"{BOS} $A <eos>"])
def test_an_eos_that_the_tokenizer_appends_is_refused_before_the_run_and_by_the_processor(tmp_path: Path, single: str):
    tokenizer = ending(single)
    says = r"the tokenizer ends the prompt with the EOS token '<eos>' \(id 0\); take it out of post_processor in tokeni"
    with pytest.raises(PromptsError, match=rf"p\.jsonl:1: {says}"):
        prepared_chat(tmp_path, ["why"], tokenizer, data={"chat_template": False})
    for text in ("why", f"{BOS}why", "why<eos>"):
        with pytest.raises(PromptsError, match=f"^prompt 0: {says}"):
            processor(tokenizer, chat=False).generate([text], 1, [[0]])


def test_the_remedy_for_an_appended_eos_works(tmp_path: Path):
    with pytest.raises(PromptsError):
        prepared_chat(tmp_path, ["why"], ending("$A <eos>"), data={"chat_template": False})
    file = tmp_path / "c" / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    prepare(job_on(tmp_path / "c", tmp_path / "p.jsonl")())


def test_a_chat_template_is_not_blamed_for_what_the_tokenizer_would_append(tmp_path: Path):
    prepared = prepared_chat(tmp_path, ["why"], ending(f"{BOS} $A <eos>"))
    assert prepared.prompts.ending_with_eos == 0


@pytest.mark.parametrize(("text", "after"), [("why", 0), ("why<eos>", 1), ("<eos>why", 0)])
def test_an_eos_that_the_text_itself_ends_with_is_kept_and_counted(tmp_path: Path, text: str, after: int):
    config = {"prompts": ["so", text], "chat_template": False}
    assert prepared_chat(tmp_path, ["x"], data=config).prompts.ending_with_eos == after
    ids = sampled_from(processor(chat_tokenizer(), chat=False), text)
    assert (ids[-1] == 0) is bool(after)


def test_an_eos_that_is_also_bos_begins_a_text(tmp_path: Path):
    """GPT-2 and its like start an unconditional text that way."""
    tokenizer = chat_tokenizer(adds_bos=False)
    tokenizer.bos_token = "<eos>"
    config = {"prompts": ["<eos>"], "chat_template": False}
    prepared = prepared_chat(tmp_path, ["x"], tokenizer, data=config, batch={"prompts_per_round": 1})
    assert prepared.prompts.ending_with_eos == 0


# What is refused


def refused(directory: Path, prompt: Any, tokenizer: Any = None, error: type[InputError] = PromptsError) -> str:
    with pytest.raises(error) as caught:
        prepared_chat(directory, ["fine", prompt], tokenizer)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and caught.value.exit_code == 2
    assert SECRET not in message and len(message) < 400 + len(str(directory))
    return message


REFUSED = {
    "a number": (7, "p.jsonl:2: prompt: a number (int); need a string or a list of messages"),
    "blank": (" ", "p.jsonl:2: the prompt is blank"),
    "no message": ([], "p.jsonl:2: the prompt is blank"),
    "blank messages": ([user(" "), user("")], "p.jsonl:2: the prompt is blank"),
    "a list of strings": ([SECRET], "p.jsonl:2: message 0: a string; need an object with role and content"),
    "no role": ([{"content": SECRET}], "p.jsonl:2: message 0: role is null; need a string"),
    "a role that is a number": ([user("a"), {"role": 1, "content": "b"}], "message 1: role is a number (int); need a"),
    "content null": ([user(SECRET), {"role": "user", "content": None}], "message 1: content is null; need a string"),
    "content in parts": (
        [{"role": "user", "content": [{"type": "text", "text": SECRET}]}], "message 0: content is a list; need a",
    ),
    "another key": ([user("a") | {"name": SECRET}], "message 0: 'name'; need role and content and nothing else"),
    "the assistant last": (
        [user("a"), {"role": "assistant", "content": SECRET}], "p.jsonl:2: the last message is the assistant's; the",
    ),
    "a role the template refuses": (
        [user(SECRET), {"role": "tool", "content": SECRET}],
        "p.jsonl:2: the chat template refuses it (This model knows no tools); its roles are 'user, tool'",
    ),
    "a refusal that quotes": (
        [{"role": "critic", "content": SECRET}],
        "p.jsonl:2: the chat template refuses it (TemplateError); its roles are 'critic'",
    ),
    "half of a surrogate pair": ([user("\ud800")], "p.jsonl:2: half of a surrogate pair is no character"),
}  # fmt: skip


@pytest.mark.parametrize(("prompt", "part"), REFUSED.values(), ids=REFUSED)
def test_a_bad_chat_is_refused_by_file_line_and_remedy_and_never_quoted(tmp_path: Path, prompt: Any, part: str):
    assert part in refused(tmp_path, prompt)


@pytest.mark.parametrize("template", [None, {"tool_use": TEMPLATE}], ids=["none", "no default"])
def test_a_tokenizer_without_a_chat_template_is_refused_with_the_remedy(tmp_path: Path, template: Any):
    message = refused(tmp_path, "a", chat_tokenizer(template=template), ConfigError)
    assert message.startswith("data.chat_template: got True; the tokenizer has no default chat template; put chat_temp")


@pytest.mark.parametrize(
    ("template", "error", "part"),
    [
        ("{% for x in %}", ConfigError, "data.chat_template: got True; the chat template does not compile (Expected"),
        ("{{ messages[0].content + 1 }}", PromptsError, "p.jsonl:1: the chat template refuses it (TypeError)"),
        ("{{ messages[0].content | int // 0 }}", PromptsError, "refuses it (ZeroDivisionError)"),
        ("{{ messages[9].content.x }}", PromptsError, "refuses it (UndefinedError)"),
        ("{{ ''.__class__.__mro__ }}", PromptsError, "refuses it (SecurityError)"),
        ("{{ '' }}", PromptsError, "p.jsonl:1: the chat template makes nothing of it; check the template"),
        ("{{ bos_token * 2 + messages[0].content }}", PromptsError, "p.jsonl:1: the prompt begins with two BOS tokens"),
    ],
)
def test_a_broken_template_ends_in_one_line(tmp_path: Path, template: str, error: type[InputError], part: str):
    assert part in refused(tmp_path, "a", chat_tokenizer(template=template), error)


def test_messages_without_a_chat_template_are_refused_with_the_remedy(tmp_path: Path):
    with pytest.raises(PromptsError, match=r":1: prompt: a list; need a string, or data\.chat_template: true for a"):
        prepared_chat(tmp_path, [[user(SECRET)]], data={"chat_template": False})


def test_the_fingerprint_of_a_chat_is_of_its_roles_and_contents_alone(tmp_path: Path):
    def digest(*messages: dict[str, Any]) -> str:
        file = write_jsonl(tmp_path / "p.jsonl", [{"prompt": list(messages), "id": "x"}])
        return load_prompts(str(file), render=lambda prompt, where: json.dumps(prompt)).sha256

    assert digest(user("a")) == digest({"content": "a", "name": None, "role": "user"})
    different = [digest(user("a")), digest(user("b")), digest({"role": "system", "content": "a"}, user("a"))]
    assert len(set(different)) == 3
