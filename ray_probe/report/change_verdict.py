"""What a comparison found, in a sentence, and what to do next."""

from ray_probe.report.number_format import about, is_missing, number, signed, with_error
from ray_probe.run.comparison.change import Change, ChangeFigure
from ray_probe.run.result import Result

LOW_SAMPLE_SHARE = 0.1
"""Below this effective sample share the visitation part gains little over measuring both apart."""
LOW_MOVED_SHARE = 0.05
"""Below this share of parameters the files' precision may hide a small step."""


def change_text(change: Change) -> str:
    """Return the finding: the change with its parts, or that none is seen."""
    total = change.total
    if total.value is None:
        return "the change of entropy is not known"
    if total.se is None:
        return f"entropy changed by {signed(total.value)} nats a response, without an error: that takes two prompts"
    if total.value == 0 and total.se == 0:
        return "no change: both checkpoints say the same of every response"
    if _is_seen(total):
        per_token, length = change.per_token.change, change.length.change
        return (
            f"entropy changed by {with_error(total.value, total.se, plus=True)} nats a response, "
            f"{with_error(per_token.value, per_token.se, plus=True)} a token: {_parts(change)}; "
            f"responses are {_longer(length.value, length.se)}"
        )
    low, high = total.interval or (total.value, total.value)
    return f"no change seen; 95 % interval {number(low, 2)} to {number(high, 2)} nats a response"


def change_advice(result: Result) -> str | None:
    """Return how to see a change that is not seen yet; None where nothing is to do."""
    change, sequences = result.change, result.counts.sequences
    if change is None or change.total.se is None or not change.total.se > 0 or _is_seen(change.total):
        return None
    return f"{about(4.0 * sequences)} responses for ± {number(change.total.se / 2.0, 2)} nats: add rounds or prompts"


def change_caveats(change: Change) -> list[str]:
    """Return the warnings that are due for a comparison."""
    found, share, moved = [], change.effective_sample_share, change.moved_share
    if share is not None and share < LOW_SAMPLE_SHARE:
        found.append(
            f"FAR APART: A's responses are worth {number(share, 2)} of their number for B; the total is unbiased all "
            "the same, and the gain over measuring both apart is small. Compare checkpoints that are nearer."
        )
    if moved is not None and 0 < moved < LOW_MOVED_SHARE:
        found.append(
            f"FEW PARAMETERS MOVED: {number(100.0 * moved, 2)} % of them differ. Checkpoints in bfloat16 hide small "
            "steps; compare checkpoints in float32, or further apart."
        )
    return found


def _is_seen(total: ChangeFigure) -> bool:
    """Return whether the interval of the change leaves 0 out."""
    return total.interval is not None and not total.interval[0] <= 0.0 <= total.interval[1]


def _parts(change: Change) -> str:
    pathwise, visitation = change.pathwise, change.visitation
    return (
        f"{with_error(pathwise.value, pathwise.se, plus=True)} at the states visited, "
        f"{with_error(visitation.value, visitation.se, plus=True)} through which states are visited"
    )


def _longer(value: float | None, se: float | None) -> str:
    if value is None or is_missing(value):
        return "of unknown length"
    return f"{with_error(abs(value), se)} tokens {'longer' if value >= 0 else 'shorter'}"
