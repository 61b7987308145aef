"""Encodes prompts, and detects special tokens that a tokenizer adds."""

from collections.abc import Sequence
from typing import Any


def encode_prompts(tokenizer: Any, texts: Sequence[str], chat: bool) -> list[list[int]]:
    """Returns token ids of prompts, with at most one BOS token.

    Args:
        tokenizer: of the checkpoint.
        texts: at least one prompt.
        chat: the texts come from a chat template, which wrote the special tokens.
    """
    encoded = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=not chat, verbose=False)["input_ids"]]
    bos = tokenizer.bos_token_id
    if chat or bos is None or tokenizer("", verbose=False)["input_ids"][:1] != [bos]:
        return encoded
    return [ids[1:] if begins_with_two_bos(tokenizer, ids) else ids for ids in encoded]


def begins_with_two_bos(tokenizer: Any, ids: Sequence[int]) -> bool:
    """Returns whether a prompt has the BOS token twice, once from its own text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(ids[:2]) == [bos, bos]


def appended_eos(tokenizer: Any, text: str, ids: Sequence[int], eos_ids: Sequence[int], chat: bool) -> str | None:
    """Returns a warning that the tokenizer appended an EOS token; None if it did not.

    A response would begin after the end of the text, which no training has seen. An EOS token from the prompt's text or
    the chat template is accepted.

    Args:
        tokenizer: of the policy.
        text: the prompt.
        ids: its ids, from `encode_prompts`.
        eos_ids: ids that end a response.
        chat: the text comes from a chat template.
    """
    if chat or ids[-1] not in eos_ids:
        return None
    plain = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if list(ids[len(ids) - len(plain) :]) == plain:
        return None
    token = tokenizer.convert_ids_to_tokens(ids[-1])
    remedy = "take it out of post_processor in tokenizer.json (without that file: set add_eos_token to false)"
    return f"the tokenizer ends the prompt with the EOS token {token!r} (id {ids[-1]}); {remedy}"
