"""What a reader must know before using a result: one sentence or two for each thing that is off."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ray_probe.checkpoints.tokenizer.eos import KEY as EOS_KEY
from ray_probe.checkpoints.tokenizer.eos import shown_ids, shown_others
from ray_probe.report.number_format import number, percent, with_error

CONDITION_LIMIT = 1e12
TRUNCATED_LIMIT = 0.05
EOS_ONLY_LIMIT = 0.5
SHARDS_LISTED = 12
FEW_SHARDS = 8
CLEARLY_WORSE = 2.0
"""Standard errors of a paired difference."""

_SHARD_ID = re.compile(r"(\d+)/(\d+)")
Result = dict[str, Any]


def caveats(result: Result) -> list[str]:
    """The warnings that are due for this result, worst first; empty when there are none."""
    found = (check(result) for check in _CHECKS)
    return [text for text in found if text is not None]


def baseline_of(result: Result) -> dict[str, Any]:
    """The section `estimator.baseline` of the result's config; empty when absent."""
    baseline: dict[str, Any] = result.get("config", {}).get("estimator", {}).get("baseline", {})
    return baseline


def ill_conditioned(beta: dict[str, Any]) -> bool:
    """Whether the fit's condition number is past what float64 solves with digits to spare."""
    condition = beta.get("condition_number")
    return condition is not None and not condition <= CONDITION_LIMIT


def ended_early(result: Result) -> bool:
    """Whether rounds of the plan are missing that no budget has forbidden."""
    batch, counts = result.get("config", {}).get("batch", {}), result.get("counts", {})
    planned, rounds, sequences = batch.get("rounds"), counts.get("rounds"), counts.get("sequences") or 0
    if planned is None or rounds is None or rounds >= planned:
        return False
    most, limit_s = batch.get("max_sequences"), batch.get("max_seconds")
    a_round = (batch.get("prompts_per_round") or 0) * (batch.get("responses_per_prompt") or 0)
    used_up = most is not None and sequences + a_round > most
    seconds = (result.get("timing") or {}).get("seconds") or 0.0
    return not used_up and (limit_s is None or seconds < limit_s)


def has_few_shards(result: Result) -> bool:
    """Whether a round has so few shards that their baselines, fitted on one another, bias `norm_sq_debiased`."""
    counts, baseline = result.get("counts", {}), baseline_of(result)
    shards, rounds = counts.get("shards") or 0, counts.get("rounds") or 1
    fitted_on_another = baseline.get("mode") != "none" and baseline.get("fit") == "leave_one_out"
    return fitted_on_another and 1 < shards < FEW_SHARDS * rounds


def worse_baseline(mode: str | None, paired: Sequence[Mapping[str, Any]] | None) -> str | None:
    """A warning where the baseline in use leaves clearly more noise than another one.

    Args:
        mode: the mode in use.
        paired: `advantage_paired` of a result: differences of the mean squared advantage on the same tokens.
    """
    worse = []
    for pair in paired or ():
        difference, error = pair.get("difference"), pair.get("se")
        if mode not in (pair["mode"], pair["against"]) or difference is None or error is None:
            continue
        other, excess = (pair["against"], difference) if pair["mode"] == mode else (pair["mode"], -difference)
        if excess > CLEARLY_WORSE * error:
            worse.append((excess, error, other))
    if not worse:
        return None
    excess, error, other = max(worse)
    return (
        f"WORSE BASELINE: {mode}, which is in use, leaves {with_error(excess, error)} nats² a token more noise in the "
        f"score term than {other} does on the same responses. The gradient is unbiased all the same; set "
        f"estimator.baseline.mode to {other} for less noise."
    )


def _worse_baseline(result: Result) -> str | None:
    return worse_baseline(baseline_of(result).get("mode"), result.get("advantage_paired"))


def _partial(result: Result) -> str | None:
    lost = result.get("partial")
    if not lost:
        return None
    return (
        f"PARTIAL: {_how_many(len(lost), 'shard')} given up: {_listed(lost)}. Leaving out what failed can bias every "
        "figure here (often it is the longest responses that fail)."
    )


def _conflicts(result: Result) -> str | None:
    twice = result.get("conflicts")
    if not twice:
        return None
    return (
        f"CONFLICT: {_how_many(len(twice), 'shard')} came twice with different bytes: {_listed(twice)}. The first was "
        "kept; the run cannot be reproduced until the cause is found."
    )


def _fallback(result: Result) -> str | None:
    beta = result.get("beta") or {}
    if not beta.get("fallback"):
        return None
    fallback, used = beta["fallback"], baseline_of(result).get("mode") == "regression"
    what = f"the baseline in use was {fallback}" if used else f"the regression row shows {fallback}"
    return f"FALLBACK: beta could not be fitted; {what}."


def _in_sample(result: Result) -> str | None:
    baseline = baseline_of(result)
    if baseline.get("fit") != "in_sample" or baseline.get("mode") == "none":
        return None
    return (
        "IN_SAMPLE: the baseline was fitted on the responses it is subtracted from. This biases the gradient at order "
        "1/N (in a toy 15-24 % of its norm at 4 responses, 4-6 % at 16, 1 % at 64); leave_one_out does not."
    )


def _score_only(result: Result) -> str | None:
    if result.get("config", {}).get("generation", {}).get("rb_requires_grad", True):
        return None
    return "SCORE TERM ONLY: generation.rb_requires_grad is false; the gradient leaves the pathwise term out."


def _unfitted(result: Result) -> str | None:
    counts = result.get("counts", {})
    unfitted = counts.get("unfitted_shards") or 0
    if unfitted <= 0 or baseline_of(result).get("mode") == "none":
        return None
    return (
        f"UNFITTED: {unfitted:,} of {_how_many(counts.get('shards'), 'shard')} had no fit to use, so mu_hat was 0: "
        "no bias, but the noise of mode none."
    )


def _unfinished(result: Result) -> str | None:
    if not ended_early(result):
        return None
    rounds, planned = result["counts"]["rounds"], result["config"]["batch"]["rounds"]
    return f"UNFINISHED: {rounds} of {planned} rounds; run --resume goes on with it."


def _repeated(result: Result) -> str | None:
    repeated = result.get("counts", {}).get("repeated_prompts") or 0
    if repeated <= 0:
        return None
    return (
        f"REPEATED: {repeated:,} prompts were used more than once, so shards are not independent and the gradient's "
        "noise and the errors by shard are n/a; give more prompts, or fewer rounds."
    )


def _few_shards(result: Result) -> str | None:
    if not has_few_shards(result):
        return None
    a_round = result["counts"]["shards"] / (result["counts"].get("rounds") or 1)
    return (
        f"FEW SHARDS: {a_round:.3g} a round; below {FEW_SHARDS} the shards' baselines, fitted on one another, make "
        "norm_debiased and snr too large (the gradient itself stays unbiased). Lower batch.shard_prompts."
    )


def _ill_conditioned(result: Result) -> str | None:
    beta = result.get("beta") or {}
    if not ill_conditioned(beta):
        return None
    return (
        f"ILL-CONDITIONED: condition number {number(beta['condition_number'], 2)} of Phi^T Phi + lambda I; the single "
        "entries of beta mean little (mu_hat may still be good). Drop collinear features or raise ridge_lambda."
    )


def _truncated(result: Result) -> str | None:
    counts = result.get("counts", {})
    truncated, sequences = counts.get("truncated") or 0, counts.get("sequences") or 0
    if truncated <= TRUNCATED_LIMIT * sequences:
        return None
    cap = result.get("config", {}).get("generation", {}).get("max_new_tokens")
    at = "max_new_tokens" if cap is None else f"max_new_tokens = {cap:,}"
    return (
        f"TRUNCATED: {percent(truncated, sequences)} of responses were cut at {at}. They count, as they must: all "
        "figures speak of the capped process. Raise the cap to speak of whole responses."
    )


def _eos_only(result: Result) -> str | None:
    counts = result.get("counts", {})
    eos_only, sequences = counts.get("eos_only") or 0, counts.get("sequences") or 0
    if eos_only <= EOS_ONLY_LIMIT * sequences:
        return None
    return (
        f"EOS ONLY: {percent(eos_only, sequences)} of responses end at their first token. Check the prompts' format "
        "and eos_token_ids."
    )


def _eos_sources(result: Result) -> str | None:
    eos = result.get("eos") or {}
    if not eos.get("others") or eos["source"] == EOS_KEY:
        return None
    texts = {int(token): text for token, text in eos["texts"].items()}
    others = shown_others(eos["others"].items(), texts)
    return f"EOS: responses end at {shown_ids(eos['ids'], texts)} ({eos['source']}); {others}. {EOS_KEY} decides."


def _how_many(count: int | None, noun: str) -> str:
    return f"{number(count)} {noun}{'' if count == 1 else 's'}"


def _listed(shards: Iterable[Any]) -> str:
    names = [shard_name(str(shard)) for shard in shards]
    more = f" and {len(names) - SHARDS_LISTED:,} more (result.json)" if len(names) > SHARDS_LISTED else ""
    return ", ".join(names[:SHARDS_LISTED]) + more


def shard_name(text: str) -> str:
    """Put ids of shards, `0/3`, as people read them: `shard 3 of round 1`."""
    return _SHARD_ID.sub(lambda found: f"shard {found[2]} of round {int(found[1]) + 1}", text)


_CHECKS = (
    _unfinished, _partial, _conflicts, _fallback, _worse_baseline, _in_sample, _score_only, _unfitted, _repeated,
    _few_shards, _ill_conditioned, _truncated, _eos_only, _eos_sources,
)  # fmt: skip
