"""The warnings that are due for a result: what a reader must know before using it."""

import re
from collections.abc import Iterable, Iterator, Sequence

from ray_probe.checkpoints.tokenizer.eos import KEY as EOS_KEY
from ray_probe.report.change_verdict import change_caveats
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
    of_change = [] if result.change is None else change_caveats(result.change)
    own = *_of_the_estimator(result), *of_change, *_of_the_plan(result), *_of_responses(result)
    return [*_of_shards(result), *own]


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
        f"WORSE BASELINE: {mode}, which is in use, leaves {with_error(excess, error)} nats² a token more noise than "
        f"{other} does on the same responses. The estimate is unbiased all the same; set "
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


def _of_shards(result: Result) -> Iterator[str]:
    """Yield the warnings about shards and rounds that are missing or in doubt."""
    if ended_early(result):
        yield f"UNFINISHED: {result.counts.rounds} of {result.settings.rounds} rounds; run --resume continues it."
    if lost := result.partial:
        yield (
            f"PARTIAL: {count(len(lost), 'shard')} given up: {_listed(lost)}. Leaving out what failed can bias every "
            "figure here (often it is the longest responses that fail)."
        )
    if twice := result.conflicts:
        yield (
            f"CONFLICT: {count(len(twice), 'shard')} came twice with different bytes: {_listed(twice)}. The first was "
            "kept; the run cannot be reproduced until the cause is found."
        )


def _of_the_estimator(result: Result) -> Iterator[str]:
    """Yield the warnings about the baseline and the terms of the gradient."""
    settings, counts = result.settings, result.counts
    if fallback := result.beta.fallback:
        used = settings.mode == "regression"
        where = f"the baseline in use was {fallback}" if used else f"the regression row shows {fallback}"
        yield f"FALLBACK: beta could not be fitted; {where}."
    if worse := worse_baseline(settings.mode, result.advantage_paired):
        yield worse
    if settings.fit == "in_sample" and settings.mode != "none":
        yield (
            "IN_SAMPLE: the baseline was fitted on the responses it is subtracted from. This biases the estimate at "
            "order 1/N (in a toy, of a gradient's norm 15-24 % at 4 responses, 4-6 % at 16, 1 % at 64); leave_one_out "
            "does not."
        )
    if not settings.rb_requires_grad and result.change is None:
        yield "SCORE TERM ONLY: generation.rb_requires_grad is false; the gradient leaves the pathwise term out."
    if counts.unfitted_shards > 0 and settings.mode != "none":
        yield (
            f"UNFITTED: {counts.unfitted_shards:,} of {count(counts.shards, 'shard')} had no fit to use, so mu_hat was "
            "0: no bias, but the noise of mode none."
        )


def _of_the_plan(result: Result) -> Iterator[str]:
    """Yield the warnings about too few prompts, shards or responses."""
    settings, counts = result.settings, result.counts
    if counts.repeated_prompts > 0:
        yield (
            f"REPEATED: {counts.repeated_prompts:,} prompts were used more than once, so shards are not independent "
            "and the errors of the advantages by shard are n/a; give more prompts, or fewer rounds."
        )
    if 1 <= counts.shards < FEW_SHARDS:
        yield (
            f"FEW SHARDS: {count(counts.shards, 'shard')}; below {FEW_SHARDS} the advantages have no errors, which "
            "would be too small. Lower batch.shard_prompts, or add rounds."
        )
    if settings.responses_per_prompt == 1 and settings.mode == "regression":
        yield (
            "ONE RESPONSE A PROMPT: the baseline has no other response of a prompt to read. Half the prompts with "
            "batch.responses_per_prompt=2 would be more precise where prompts differ."
        )
    if ended := _target(result):
        yield ended
    if unsure := ill_conditioned(result.beta):
        yield unsure


def _target(result: Result) -> str | None:
    """Return what the end of a run with a target error means for its figures."""
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


def _of_responses(result: Result) -> Iterator[str]:
    """Yield the warnings about the ends of responses."""
    counts, cap, eos = result.counts, result.settings.max_new_tokens, result.eos
    if counts.truncated > TRUNCATED_LIMIT * counts.sequences:
        at = "max_new_tokens" if cap is None else f"max_new_tokens = {cap:,}"
        yield (
            f"TRUNCATED: {percent(counts.truncated, counts.sequences)} of responses were cut at {at}. They count, as "
            "they must: all figures are those of the capped process. Raise the cap to measure whole responses."
        )
    if counts.eos_only > EOS_ONLY_LIMIT * counts.sequences:
        yield (
            f"EOS ONLY: {percent(counts.eos_only, counts.sequences)} of responses end at their first token. Check the "
            "prompts' format and eos_token_ids."
        )
    if eos is not None and eos.others and eos.source != EOS_KEY:
        yield f"EOS: responses end at {eos.line()}; {eos.differences()}. {EOS_KEY} decides."


def _listed(shards: Iterable[str]) -> str:
    names = [shard_name(shard) for shard in shards]
    more = f" and {len(names) - SHARDS_LISTED:,} more (result.json)" if len(names) > SHARDS_LISTED else ""
    return ", ".join(names[:SHARDS_LISTED]) + more


def shard_name(text: str) -> str:
    """Replace ids of shards, `0/3`, by names for people: `shard 3 of round 1`."""
    return _SHARD_ID.sub(lambda found: f"shard {found[2]} of round {int(found[1]) + 1}", text)
