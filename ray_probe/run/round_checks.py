"""What must hold of a round before and after it is committed."""

from collections.abc import Collection

from ray_probe.core.estimator.baselines import PublishedFit
from ray_probe.errors import GradientError, ShardError
from ray_probe.gradient.layout import ParameterLayout
from ray_probe.run.backend import RoundOutcome
from ray_probe.run.messages import GradientReport, ShardKey, ShardSums, shard_label

MAX_NAMES = 3


def told_with(number: int, first: int, came_again: Collection[ShardKey], told: Collection[ShardKey]) -> list[ShardKey]:
    """Of the shards that came again with other bytes, those that are told with a round: its own, ascending.

    With the first round that is not committed come those of rounds before that nobody was told of: a process that was
    thought dead may deliver at any time.

    Args:
        number: the round.
        first: the first round that is not committed.
        came_again: such shards so far.
        told: those that were told with the rounds before `first`.
    """
    late = {key for key in came_again if key[0] < first and number == first} - set(told)
    return sorted(late | {key for key in came_again if key[0] == number})


def ids_of(keys: Collection[ShardKey]) -> list[str]:
    """Shards as results name them."""
    return [f"{number}/{shard}" for number, shard in keys]


def refuse_without_sums(outcome: RoundOutcome) -> None:
    """A round that nothing is left of can give no estimate. Raises ShardError."""
    if not outcome.sums:
        raise ShardError(f"round {outcome.round + 1}: every shard was given up; see log.txt for the causes")


def check_reached(layout: ParameterLayout, reports: Collection[GradientReport]) -> None:
    """Refuse parameters that no shard of any actor gave a gradient to; an expert that some shard reached is fine.

    Raises:
        GradientError: some parameter takes no part in the loss.
    """
    unreached = set.intersection(*(set(report.unreached) for report in reports)) if reports else set()
    if unreached:
        names = [layout.names[place] for place in sorted(unreached)]
        shown = ", ".join(name[-80:] for name in names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
        raise GradientError(
            f"gradient: {len(names)} of {len(layout.names)} trainable parameters got none in any shard ({shown}); "
            "choose others with model.trainable"
        )


def check_baseline(report: ShardSums, fit: PublishedFit) -> None:
    """Refuse a shard whose gradient was formed under another baseline than the plan's.

    Args:
        report: what the shard says of its baseline.
        fit: the fit that gradients of its round use.

    Raises:
        ShardError: the version differs, or its own record was left in (or out) where it should not be.
    """
    leave_out = fit.rule.fit == "leave_one_out" and fit.round >= report.round
    if (report.version, report.own_left_out) != (fit.version, leave_out):
        got, asked = (
            f"version {version} with its own record {'out' if out else 'in'}"
            for version, out in ((report.version, report.own_left_out), (fit.version, leave_out))
        )
        label = shard_label(report.round, report.shard)
        raise ShardError(f"{label}: its baseline is {got}; the plan asks for {asked}")
