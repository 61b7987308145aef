"""Chat templates: from messages to text.

A chat template writes the special tokens itself, so its text is encoded without further ones. Other prompts get those
that the tokenizer adds. No prompt begins with two BOS tokens.
"""

import re
from datetime import datetime
from typing import Any

from ray_probe.data.rows import kind
from ray_probe.errors import ConfigError, PromptsError, bad_value, cut

Message = dict[str, str]
_TODAY = re.compile(r"strftime_now\(\s*(['\"])([^'\"\\]*)\1\s*\)")


def checked_messages(value: list[Any], where: str) -> list[Message]:
    """Returns messages for a chat template. Raises PromptsError with their place.

    Keys with null are dropped, because a parquet column has every key in every row.
    """
    messages = [_message(item, f"{where}: message {number}") for number, item in enumerate(value)]
    if not any(message["content"].strip() for message in messages):
        raise PromptsError(f"{where}: the prompt is blank; write a prompt or remove it")
    if messages[-1]["role"] == "assistant":
        remedy = "the template would begin another turn of it; end with the turn that is to be answered"
        raise PromptsError(f"{where}: the last message is the assistant's; {remedy}")
    return messages


def _message(item: object, where: str) -> Message:
    if not isinstance(item, dict):
        raise PromptsError(f"{where}: {kind(item)}; need an object with role and content")
    for key in ("role", "content"):
        if not isinstance(item.get(key), str):
            raise PromptsError(f"{where}: {key} is {kind(item.get(key))}; need a string")
    others = [str(key) for key, value in item.items() if key not in ("role", "content") and value is not None]
    if others:
        raise PromptsError(f"{where}: {cut(', '.join(map(repr, others)))}; need role and content and nothing else")
    return {"role": item["role"], "content": item["content"]}


class ChatTemplate:
    """The chat template of a tokenizer, with the generation prompt added.

    Args:
        tokenizer: of the checkpoint.
        created: when the run was created. A template that writes today's date writes this one, so that a run resumed
            on another day keeps its prompts.

    Raises:
        ConfigError: the tokenizer has no default chat template.
    """

    def __init__(self, tokenizer: Any, created: datetime) -> None:
        self._tokenizer = tokenizer
        try:
            template = tokenizer.get_chat_template()
        except ValueError:
            remedy = "the tokenizer has no default chat template; put chat_template.jinja beside it, or set this to"
            raise ConfigError(bad_value("data.chat_template", True, f"{remedy} false")) from None
        self._template = _TODAY.sub(lambda call: repr(created.strftime(call[2])), template)

    def __call__(self, prompt: str | list[Message], where: str) -> str:
        """Returns the text of a prompt; a string is one user turn. Raises InputError."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        bos = self._tokenizer.bos_token
        if bos and any(message["content"].startswith(bos) for message in messages):
            remedy = "set data.chat_template to false if it went through a template already, else take the token out"
            raise PromptsError(f"{where}: a message begins with the BOS token; {remedy}")
        try:
            text = self._tokenizer.apply_chat_template(
                messages, chat_template=self._template, tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # templates raise whatever their expressions raise
            raise self._refused(error, messages, where) from None
        if not text.strip():
            raise PromptsError(f"{where}: the chat template makes nothing of it; check the template")
        return str(text)

    def _refused(self, error: Exception, messages: list[Message], where: str) -> ConfigError | PromptsError:
        if type(error).__name__ == "TemplateSyntaxError":
            reason = f"the chat template does not compile ({' '.join(str(error).split())[:200]})"
            return ConfigError(bad_value("data.chat_template", True, f"{reason}; repair it, or set this to false"))
        written = str(error) and str(error) in self._template  # text of its own, which cannot quote a prompt
        reason = " ".join(str(error).split())[:200] if written else type(error).__name__
        roles = cut(", ".join(message["role"] for message in messages))
        return PromptsError(f"{where}: the chat template refuses it ({reason}); its roles are {roles!r}")


