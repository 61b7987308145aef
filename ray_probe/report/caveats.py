"""The warnings that are due for a result: what a reader must know before using it."""

import re
from collections.abc import Iterable, Sequence

from ray_probe.checkpoints.tokenizer.eos import KEY as EOS_KEY
from ray_probe.checkpoints.tokenizer.eos import shown_ids, shown_others
from ray_probe.report.number_format import count, number, percent, with_error
from ray_probe.run.result import FEW_SHARDS, Beta, PairedDifference, Result

CONDITION_LIMIT = 1e12
TRUNCATED_LIMIT = 0.05
EOS_ONLY_LIMIT = 0.5
SHARDS_LISTED = 12
CLEARLY_WORSE = 2.0
"""Standard errors of a paired difference."""

_SHARD_ID = re.compile(r"(\d+)/(\d+)")


def caveats(result: Result) -> list[str]:
    """Return the warnings that are due for this result, worst first."""
    found = (check(result) for check in _CHECKS)
    return [text for text in found if text is not None]


def ended_early(result: Result) -> bool:
    """Return whether the plan has more rounds, and no budget ended the run."""
    settings, counts = result.settings, result.counts
    if settings.rounds is None or not 0 < counts.rounds < settings.rounds:
        return False
    a_round = (settings.prompts_per_round or 0) * (settings.responses_per_prompt or 0)
    used_up = settings.max_sequences is not None and counts.sequences + a_round > settings.max_sequences
    return not used_up and (settings.max_seconds is None or (result.timing.seconds or 0.0) < settings.max_seconds)


def worse_baseline(mode: str | None, paired: Sequence[PairedDifference] | None) -> str | None:
    """Return a warning where another baseline leaves clearly less noise.

    Args:
        mode: the baseline in use.
        paired: differences of the mean squared advantage on the same tokens.
    """
    worse = []
    for pair in paired or ():
        if mode not in (pair.mode, pair.against) or pair.difference is None or pair.se is None:
            continue
        first = pair.mode == mode
        other, excess = (pair.against, pair.difference) if first else (pair.mode, -pair.difference)
        low, high = pair.interval or (pair.difference, pair.difference)
        # Few shards have wide intervals, by Student's t.
        if excess > CLEARLY_WORSE * pair.se and not low <= 0.0 <= high:
            worse.append((excess, pair.se, other))
    if not worse:
        return None
    excess, error, other = max(worse)
    return (
        f"WORSE BASELINE: {mode}, which is in use, leaves {with_error(excess, error)} nats² a token more noise in the "
        f"score term than {other} does on the same responses. The gradient is unbiased all the same; set "
        f"estimator.baseline.mode to {other} for less noise."
    )


def ill_conditioned(beta: Beta) -> str | None:
    """Return a warning where float64 cannot solve the fit with digits to spare."""
    if beta.condition_number is None or beta.condition_number <= CONDITION_LIMIT:
        return None
    return (
        f"ILL-CONDITIONED: condition number {number(beta.condition_number, 2)} of Phi^T Phi + lambda I; the single "
        "entries of beta mean little (mu_hat may still be good). Drop collinear features or raise ridge_lambda."
    )


def _worse_baseline(result: Result) -> str | None:
    return worse_baseline(result.settings.mode, result.advantage_paired)


def _one_response(result: Result) -> str | None:
    settings = result.settings
    if settings.responses_per_prompt != 1 or settings.mode != "regression":
        return None
    return (
        "ONE RESPONSE A PROMPT: the baseline has no other response of a prompt to read. Half the prompts with "
        "batch.responses_per_prompt=2 would be more precise where prompts differ."
    )


def _target(result: Result) -> str | None:
    target = result.settings.target_error
    if target is None or result.stopped_by is None:
        return None
    size = f"{target['nats']:g} nats" if target.get("nats") is not None else f"{target['relative']:g} of it"
    if result.stopped_by == "target_error":
        return (
            f"STOPPED BY ITS OWN ERROR: the run ended where the error of the {target['of']} was at most {size}. Such a "
            "run is not unbiased: it tends to end where its error happens to be small. Intervals are a little short."
        )
    if result.stopped_by == "target_out_of_reach":
        return (
            f"TARGET OUT OF REACH: more passes over these prompts cannot bring the error of the {target['of']} to "
            f"{size}; the prompts themselves differ too much. Give more prompts, or raise batch.target_error."
        )
    return f"TARGET NOT REACHED: {result.stopped_by} ended the run before the error of the {target['of']} was {size}."


def _partial(result: Result) -> str | None:
    if not result.partial:
        return None
    return (
        f"PARTIAL: {count(len(result.partial), 'shard')} given up: {_listed(result.partial)}. Leaving out what failed "
        "can bias every figure here (often it is the longest responses that fail)."
    )


def _conflicts(result: Result) -> str | None:
    twice = result.conflicts
    if not twice:
        return None
    return (
        f"CONFLICT: {count(len(twice), 'shard')} came twice with different bytes: {_listed(twice)}. The first was "
        "kept; the run cannot be reproduced until the cause is found."
    )


def _fallback(result: Result) -> str | None:
    fallback, used = result.beta.fallback, result.settings.mode == "regression"
    if not fallback:
        return None
    where = f"the baseline in use was {fallback}" if used else f"the regression row shows {fallback}"
    return f"FALLBACK: beta could not be fitted; {where}."


def _in_sample(result: Result) -> str | None:
    if result.settings.fit != "in_sample" or result.settings.mode == "none":
        return None
    return (
        "IN_SAMPLE: the baseline was fitted on the responses it is subtracted from. This biases the gradient at order "
        "1/N (in a toy 15-24 % of its norm at 4 responses, 4-6 % at 16, 1 % at 64); leave_one_out does not."
    )


def _score_only(result: Result) -> str | None:
    if result.settings.rb_requires_grad:
        return None
    return "SCORE TERM ONLY: generation.rb_requires_grad is false; the gradient leaves the pathwise term out."


def _unfitted(result: Result) -> str | None:
    unfitted, shards = result.counts.unfitted_shards, result.counts.shards
    if unfitted <= 0 or result.settings.mode == "none":
        return None
    return (
        f"UNFITTED: {unfitted:,} of {count(shards, 'shard')} had no fit to use, so mu_hat was 0: no bias, but the "
        "noise of mode none."
    )


def _unfinished(result: Result) -> str | None:
    if not ended_early(result):
        return None
    return f"UNFINISHED: {result.counts.rounds} of {result.settings.rounds} rounds; run --resume continues it."


def _repeated(result: Result) -> str | None:
    repeated = result.counts.repeated_prompts
    if repeated <= 0:
        return None
    return (
        f"REPEATED: {repeated:,} prompts were used more than once, so shards are not independent and the errors of "
        "the advantages by shard are n/a; give more prompts, or fewer rounds."
    )


def _few_shards(result: Result) -> str | None:
    if not 1 <= result.counts.shards < FEW_SHARDS:
        return None
    return (
        f"FEW SHARDS: {count(result.counts.shards, 'shard')}; below {FEW_SHARDS} the advantages have no errors, which "
        "would be too small. Lower batch.shard_prompts, or add rounds."
    )


def _ill_conditioned(result: Result) -> str | None:
    return ill_conditioned(result.beta)


def _truncated(result: Result) -> str | None:
    truncated, sequences, cap = result.counts.truncated, result.counts.sequences, result.settings.max_new_tokens
    if truncated <= TRUNCATED_LIMIT * sequences:
        return None
    at = "max_new_tokens" if cap is None else f"max_new_tokens = {cap:,}"
    return (
        f"TRUNCATED: {percent(truncated, sequences)} of responses were cut at {at}. They count, as they must: all "
        "figures are those of the capped process. Raise the cap to measure whole responses."
    )


def _eos_only(result: Result) -> str | None:
    eos_only, sequences = result.counts.eos_only, result.counts.sequences
    if eos_only <= EOS_ONLY_LIMIT * sequences:
        return None
    return (
        f"EOS ONLY: {percent(eos_only, sequences)} of responses end at their first token. Check the prompts' format "
        "and eos_token_ids."
    )


def _eos_sources(result: Result) -> str | None:
    eos = result.eos
    if eos is None or not eos.others or eos.source == EOS_KEY:
        return None
    texts = {int(token): text for token, text in eos.texts.items()}
    others = shown_others(eos.others.items(), texts)
    return f"EOS: responses end at {shown_ids(eos.ids, texts)} ({eos.source}); {others}. {EOS_KEY} decides."


def _listed(shards: Iterable[str]) -> str:
    names = [shard_name(shard) for shard in shards]
    more = f" and {len(names) - SHARDS_LISTED:,} more (result.json)" if len(names) > SHARDS_LISTED else ""
    return ", ".join(names[:SHARDS_LISTED]) + more


def shard_name(text: str) -> str:
    """Replace ids of shards, `0/3`, by names for people: `shard 3 of round 1`."""
    return _SHARD_ID.sub(lambda found: f"shard {found[2]} of round {int(found[1]) + 1}", text)


_CHECKS = (
    _unfinished, _partial, _conflicts, _fallback, _worse_baseline, _in_sample, _score_only, _unfitted, _repeated,
    _few_shards, _one_response, _target, _ill_conditioned, _truncated, _eos_only, _eos_sources,
)  # fmt: skip
