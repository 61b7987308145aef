"""Refuses prompts that a model cannot be measured on."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ray_probe.data.tokenization import appended_eos, begins_with_two_bos
from ray_probe.errors import PromptsError, bad_value
from ray_probe.model.context_length import Switch


@dataclass(frozen=True)
class PromptChecks:
    """The limits that a model and its tokenizer set to prompts.

    Attributes:
        tokenizer: of the policy.
        rows: rows of the embedding.
        eos_ids: ids that end a response.
        chat: prompts come from a chat template.
        limit: positions of a prompt with its response, at most; None: no limit.
        switch: length at which the rotary frequencies change for a whole batch; None: they never do.
        cap: max_new_tokens.
    """

    tokenizer: Any
    rows: int
    eos_ids: tuple[int, ...]
    chat: bool
    limit: int | None
    switch: Switch | None
    cap: int

    def check(self, prompts: Sequence[str], encoded: Sequence[Sequence[int]]) -> None:
        """Raise PromptsError for the first prompt that cannot be measured.

        Args:
            prompts: texts.
            encoded: their token ids.
        """
        for index, (text, ids) in enumerate(zip(prompts, encoded, strict=True)):
            if (problem := self._problem(text, ids)) is not None:
                raise PromptsError(f"prompt {index}: {problem}")
        self.check_lengths([len(ids) for ids in encoded], [len(ids) + self.cap for ids in encoded])

    def check_lengths(self, prompt_lens: Sequence[int], row_lens: Sequence[int]) -> None:
        """Raise PromptsError if rows would depend on other rows of their batch.

        Args:
            prompt_lens: tokens of the prompts.
            row_lens: tokens of the prompts with their responses.
        """
        if self.switch is not None and (problem := self.switch.problem(min(prompt_lens), max(row_lens))):
            raise PromptsError(bad_value("generation.max_new_tokens", self.cap, problem))

    def _problem(self, text: str, ids: Sequence[int]) -> str | None:
        if not ids:
            return "has no token; give the model at least one"
        if begins_with_two_bos(self.tokenizer, ids):
            return "begins with two BOS tokens; write one at most"
        if (appended := appended_eos(self.tokenizer, text, ids, self.eos_ids, self.chat)) is not None:
            return appended
        if max(ids) >= self.rows:
            remedy = f"past the {self.rows} embedding rows of the model; resize them, or give its own tokenizer"
            return f"has the token id {max(ids)}, {remedy}"
        if self.limit is not None and len(ids) + self.cap > self.limit:
            size = f"{len(ids)} tokens plus generation.max_new_tokens {self.cap}"
            return f"{size} pass the model's context of {self.limit}; shorten one of them"
        return None
