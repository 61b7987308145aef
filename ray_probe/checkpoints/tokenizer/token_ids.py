"""Refuse a tokenizer whose ids do not fit the model's embeddings."""

from pathlib import Path

from tokenizers import Tokenizer

from ray_probe.checkpoints.files import read_json, unusable
from ray_probe.checkpoints.tokenizer.load import TOKENIZER_CONFIG, TOKENIZER_JSON, Field, PolicyTokenizer
from ray_probe.errors import some


def check_token_ids(found: PolicyTokenizer, rows: int) -> None:
    """Refuse a tokenizer with ids that have no embedding row.

    Args:
        found: the tokenizer of the policy.
        rows: embedding rows of the model.

    Raises:
        CheckpointError: names the tokens, and those that transformers added beside the files.
    """
    tokenizer, directory, field = found.tokenizer, found.directory, found.tokenizer_from
    past = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if not past:
        return
    problem = f"its tokenizer has ids up to {past[-1][0]}, the embeddings have {rows} rows"
    if added := _not_in_files(directory, [token for _, token in past], field):
        added_by = f"no file of it holds {some(map(repr, added))}: transformers adds it to a {type(tokenizer).__name__}"
        remedy = f"set tokenizer_class to PreTrainedTokenizerFast in {TOKENIZER_CONFIG}, or resize the embeddings"
        raise unusable(directory, f"{problem}; {added_by}", remedy, field)
    named = some(f"{number} {token[:40]!r}" for number, token in past)
    raise unusable(
        directory, f"{problem} ({named})", "resize them, or put in the tokenizer that the model was trained with", field
    )


def _not_in_files(directory: Path, tokens: list[str], field: Field) -> list[str]:
    """Return the tokens that no file names; empty without a tokenizer.json."""
    if not (directory / TOKENIZER_JSON).is_file():
        return []
    found: set[str] = set(Tokenizer.from_file(str(directory / TOKENIZER_JSON)).get_vocab())
    for name in (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json"):
        raw = read_json(directory, name, required=False, field=field)
        for value in (*raw, *raw.values(), *raw.get("added_tokens_decoder", {}).values()):
            listed = value if isinstance(value, list) else [value]
            found |= {str(token.get("content") if isinstance(token, dict) else token) for token in listed}
    return [token for token in tokens if token not in found]
