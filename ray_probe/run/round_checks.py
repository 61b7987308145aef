"""Checks of a round before and after its commit."""

from collections.abc import Collection

from ray_probe.core.estimator.leave_one_out import PublishedFit
from ray_probe.errors import GradientError, ShardError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.messages import GradientReport, ShardKey, ShardSums, shard_label

MAX_NAMES = 3


def told_with(number: int, first: int, came_again: Collection[ShardKey], told: Collection[ShardKey]) -> list[ShardKey]:
    """Return the conflicting shards to report with a round, sorted.

    The first uncommitted round also reports earlier conflicts that were not reported yet.

    Args:
        number: the round.
        first: the first uncommitted round.
        came_again: every shard so far whose second record had other bytes.
        told: the shards that were reported with rounds before `first`.
    """
    # A process that was taken for dead may deliver at any time.
    late = {key for key in came_again if key[0] < first and number == first} - set(told)
    return sorted(late | {key for key in came_again if key[0] == number})


def ids_of(keys: Collection[ShardKey]) -> list[str]:
    """Return the ids of shards, as results name them."""
    return [f"{number}/{shard}" for number, shard in keys]


def check_reached(layout: ParameterLayout, reports: Collection[GradientReport]) -> None:
    """Raise GradientError where no shard of any actor gave some parameter a gradient."""
    unreached = set.intersection(*(set(report.unreached) for report in reports)) if reports else set()
    if unreached:
        names = [layout.names[place] for place in sorted(unreached)]
        shown = ", ".join(name[-80:] for name in names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
        raise GradientError(
            f"gradient: {len(names)} of {len(layout.names)} trainable parameters got none in any shard ({shown}); "
            "choose others with model.trainable"
        )


def check_baseline(report: ShardSums, fit: PublishedFit) -> None:
    """Refuse a shard whose gradient used another baseline than the plan's.

    Args:
        report: the shard's report.
        fit: the fit that gradients of its round use.

    Raises:
        ShardError: the version differs, or the fit holds the shard's own record against the plan (or lacks it).
    """
    leave_out = fit.rule.fit == "leave_one_out" and fit.round >= report.round
    if (report.version, report.own_left_out) != (fit.version, leave_out):
        got, asked = (
            f"version {version} with its own record {'out' if out else 'in'}"
            for version, out in ((report.version, report.own_left_out), (fit.version, leave_out))
        )
        label = shard_label(report.round, report.shard)
        raise ShardError(f"{label}: its baseline is {got}; the plan asks for {asked}")
