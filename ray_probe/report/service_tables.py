"""What a service or a run in progress answers, as tables for a terminal: 100 columns, plain without colour."""

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich.console import RenderableType
from rich.padding import Padding
from rich.text import Text

from ray_probe.progress import Progress
from ray_probe.report.caveats import caveats
from ray_probe.report.numbers import NOT_AVAILABLE, number, with_error
from ray_probe.report.parts import (
    MODES,
    Row,
    count,
    duration,
    figures,
    gradient_rows,
    page,
    ruled,
    shown_path,
    utc,
    warned,
)
from ray_probe.service.replies import Beta, MeasurementInfo, Status, Variance

STYLES = {
    "measuring": "bold cyan", "running": "bold cyan", "idle": "green", "done": "green", "failed": "bold red",
    "cancelled": "yellow", "closing": "yellow",
}  # fmt: skip
EXIT_CODES = {
    1: "shards came twice with different bytes, see conflicts in result.json",
    3: "PARTIAL: some shards were given up, see partial in result.json",
}
ATTENTION = "read this"
LISTED = 12
OTHERS_SHOWN = 4


def status_table(status: Status, now: datetime | None = None) -> RenderableType:
    """How a service or a run is doing; what is wrong stands at the end.

    Args:
        status: its answer.
        now: with time zone; None for the clock's.
    """
    since = datetime.fromisoformat(status.since)
    up_s = max(0.0, ((now or datetime.now(UTC)) - since).total_seconds())
    heading = Text.assemble(
        (status.name, "bold"), f"   {status.kind}   ", (status.state, STYLES.get(status.state, "")),
        f"   up {duration(up_s)}, since {utc(status.since)} UTC",
    )  # fmt: skip
    place = Text(f"namespace {status.namespace}   directory {shown_path(status.directory)}", "dim")
    draining = [Text("DRAINING: takes nothing new", "bold yellow")] if status.draining else []
    parts: list[RenderableType] = [heading, place, *draining, figures([_asked(status)])]
    if status.actors:
        parts.append(_actors(status))
    parts += [*_work(status), figures(_queue(status) + _cluster(status)), *warned(_wrong(status), ATTENTION)]
    return page(*parts)


def beta_table(beta: Beta) -> RenderableType:
    """A version of the fitted baseline, feature by feature."""
    heading = Text.assemble((beta.measurement, "bold"), f"   beta version {beta.version}   {_through(beta.round)}")
    table = ruled()
    table.add_column("Feature", min_width=24, overflow="fold")
    table.add_column("coefficient", justify="right", min_width=14)
    table.add_column("unit", style="dim", overflow="fold")
    for name, value in zip(beta.features, beta.values or [None] * len(beta.features), strict=True):
        table.add_row(Text(name), number(value), Text(f"nats per unit of {name}"))
    fit = f"R² {number(beta.r2, 3)}   condition number {number(beta.condition_number, 2)}"
    source = (
        f"fitted on {number(beta.tokens)} tokens of {number(beta.sequences)} responses; "
        f"ridge_lambda {number(beta.ridge_lambda, 1)}"
    )
    wrong = caveats({"beta": beta.to_json() | {"fallback": None}})
    if beta.values is None:
        why = "the solve failed" if beta.tokens else "there is no token to fit on"
        wrong.insert(0, f"FALLBACK: beta could not be fitted, {why}; {beta.fallback} stands in for it.")
    policy = Text(f"policy {beta.policy_id}", "dim")
    below = (Text(fit), Text(source, "dim"), policy, *warned(wrong, ATTENTION))
    return page(heading, Padding(table, (1, 0, 0, 0)), *below)


def variance_table(variance: Variance) -> RenderableType:
    """Advantage statistics by mode, and how noisy the gradient is."""
    heading = Text.assemble((variance.measurement, "bold"), "   ")
    if variance.rounds:
        heading.append(
            f"{count(variance.rounds, 'whole round')}, {number(variance.sequences)} responses, "
            f"{number(variance.tokens)} tokens, beta version {number(variance.beta_version)}"
        )
    else:
        heading.append("no whole round yet: estimates come with the first")
    parts: list[RenderableType] = [heading]
    own = any(value is not None for value in variance.in_sample.values())
    if variance.rounds or own:
        parts.append(_modes(variance, own))
    if own:
        newest = number(variance.in_sample_version)
        parts.append(Text(f"in-sample: mean square of version {newest} on the very records it was fitted on", "dim"))
    if variance.rounds:
        parts.append(figures(gradient_rows(variance.gradient or {}, "shards as clusters")))
    return page(*parts)


def results_table(items: Sequence[MeasurementInfo]) -> RenderableType:
    """All measurements, a row each; below, what became of those that did not end well."""
    if not items:
        return Text("no measurement yet; queue one: probe CHECKPOINT")
    table = ruled(gap=0)
    for title in ("id", "checkpoint", "state"):
        table.add_column(title, overflow="fold")
    for title in ("rounds", "responses", "entropy,\nnats", "gradient\nnorm", "snr"):
        table.add_column(title, justify="right", overflow="fold")
    table.add_column("when, UTC", overflow="fold")
    for item in items:
        table.add_row(*_result_row(item))
    noisy = any(item.gradient is not None and _root(item) is None for item in items)
    mark = [Text("~ noise included, so too large: norm² de-biased is not above 0, or unknown", "dim")] if noisy else []
    return page(table, *mark, *filter(None, map(_end, items)))


def _asked(status: Status) -> Row:
    asked, alive, starting = status.actors_asked, status.actors_alive, status.actors_starting
    missing, leaving = max(0, asked - alive - starting), max(status.actors_leaving, alive - asked)
    notes = [f"{starting} loading"] if starting else []
    notes += [f"{missing} missing"] if missing else []
    notes += [f"{leaving} too many, to leave when nothing depends on them"] if leaving else []
    return "Actors", Text(f"asked {asked}, have {alive}", "bold red" if missing else ""), "", ", ".join(notes)


def _actors(status: Status) -> RenderableType:
    table = ruled()
    for title, right in (("actor", True), ("state", False), ("node", False), ("pid", True), ("tokens", True)):
        table.add_column(title, justify="right" if right else "left", min_width=7, overflow="fold")
    placed = [actor for actor in status.actors if actor.pid is not None]
    others = [actor for actor in status.actors if actor.pid is None]
    for actor in [*placed, *others[:OTHERS_SHOWN]]:
        node, pid = actor.node or NOT_AVAILABLE, NOT_AVAILABLE if actor.pid is None else str(actor.pid)
        table.add_row(str(actor.number), Text(actor.state), Text(node), pid, number(actor.tokens))
    if len(others) > OTHERS_SHOWN:
        table.add_row("...", Text(f"{len(others) - OTHERS_SHOWN} more are starting or wait for room"), "", "", "")
    return Padding(table, (1, 0, 0, 11))


def _work(status: Status) -> list[RenderableType]:
    info, progress = status.measurement, status.progress
    if info is None:
        ask = status.kind == "service" and not status.queued and not status.draining
        return [figures([("Work", "none", "queue one: probe CHECKPOINT" if ask else "", "")])]
    heading = Text.assemble((info.id, "bold"), f"   {shown_path(info.checkpoint)}")
    if info.adapter is not None:
        heading.append(f" + {shown_path(info.adapter)}")
    rows: list[Row] = _progress(progress) if progress else [("Work", "round", "before its first shard", "")]
    rows += [
        ("", "shards retried", number(status.shards_retried), "in whole rounds"),
        ("", "so far", count(info.rounds, "whole round"), f"{number(info.sequences)} responses"),
    ]
    if info.entropy is not None:
        rows.append(("", "entropy", f"{_entropy(info)} nats", "per response"))
    return [Padding(heading, (1, 0, 0, 0)), figures(rows)]


def _progress(progress: Progress) -> list[Row]:
    at, of = progress.round + 1, progress.rounds
    speed = progress.tokens / progress.elapsed_s if progress.elapsed_s > 0 else None
    return [
        ("Work", "round", f"{at}, until a budget ends it" if of is None else f"{at} of {of}", ""),
        ("", "records", f"{progress.collected}/{progress.shards}", "shards of this round"),
        ("", "gradients", f"{progress.accumulated}/{progress.shards}", "shards of this round"),
        ("", "speed", f"{number(speed, 3)} tokens/s", f"{number(progress.tokens)} tokens"),
        ("", "beta", f"version {progress.version}" if progress.version else "none yet", ""),
        ("", "variance ratio", number(progress.variance_ratio, 3), "mean square, baseline in use to none, so far"),
    ]


def _queue(status: Status) -> list[Row]:
    ids = ", ".join(status.queued[:LISTED])
    if len(status.queued) > LISTED:
        ids += f" and {len(status.queued) - LISTED} more"
    return [("Queue", f"{len(status.queued)} waiting", f"{number(status.ended)} ended", ids)]


def _cluster(status: Status) -> list[Row]:
    names = ["CPU", "GPU", *sorted(set(status.resources) - {"CPU", "GPU"})]
    shares = [f"{name} {status.free.get(name, 0.0):g} of {status.resources.get(name, 0.0):g} free" for name in names]
    return [("Cluster", count(status.nodes, "node"), shares[0], ", ".join(shares[1:]))]


def _wrong(status: Status) -> list[str]:
    problem = [] if status.problem is None else [f"PROBLEM: {status.problem}"]
    failure = [] if status.last_failure is None else [f"LAST FAILURE: {status.last_failure}"]
    return [*problem, *failure, *status.warnings]


def _through(number_of_round: int) -> str:
    return "before any round" if number_of_round < 0 else f"through round {number_of_round} (from 0)"


def _modes(variance: Variance, own: bool) -> RenderableType:
    """A row a mode; `own` adds the newest fit on its own data."""
    square, ratios = variance.advantage_mean_square or {}, variance.advantage_mean_square_ratio or {}
    table = ruled()
    table.add_column("Advantage", min_width=14)
    titles = ["mean square,\nnats²/token", "ratio to none", "variance,\nnats²/token"] if variance.rounds else []
    if own:
        titles.append("in-sample, flattering")
    for title in titles:
        table.add_column(title, justify="right", min_width=16, max_width=21)
    for mode in MODES:
        ratio = ratios.get(mode) or {}
        cells = [number(square.get(mode)), "1" if mode == "none" else with_error(ratio.get("value"), ratio.get("se"))]
        cells.append(number((variance.advantage_variance or {}).get(mode)))
        flattering = [number(variance.in_sample.get(mode))] if own else []
        table.add_row(mode, *(cells if variance.rounds else []), *flattering)
    return Padding(table, (1, 0, 0, 0))


def _result_row(item: MeasurementInfo) -> Iterable[str | Text]:
    gradient, root = item.gradient or {}, _root(item)
    norm = f"~ {number(gradient['norm'], 3)}" if root is None and item.gradient is not None else number(root, 3)
    checkpoint = "/".join(Path(item.checkpoint).parts[-2:])
    checkpoint += "" if item.adapter is None else f"\n+ {Path(item.adapter).name}"
    return (
        Text(item.id), Text(checkpoint), Text(item.state, STYLES.get(item.state, "")), number(item.rounds),
        number(item.sequences), _entropy(item), norm, number(gradient.get("snr"), 3),
        utc(item.finished or item.started or item.submitted)[5:16],
    )  # fmt: skip


def _entropy(item: MeasurementInfo) -> str:
    entropy = item.entropy or {}
    return with_error(entropy.get("per_sequence"), entropy.get("per_sequence_se"))


def _root(item: MeasurementInfo) -> float | None:
    """The gradient's norm without its noise; None when that cannot be told from nothing."""
    norm_sq = (item.gradient or {}).get("norm_sq_debiased")
    return math.sqrt(norm_sq) if norm_sq is not None and norm_sq > 0 else None


def _end(item: MeasurementInfo) -> Text | None:
    """A line on a measurement that did not end well; None for the others."""
    cause = item.cause or EXIT_CODES.get(item.exit_code or 0)
    if cause is None:
        return None
    return Text(f"{item.id}{' failed' if item.state == 'failed' else ''}: {cause}", STYLES.get(item.state, ""))
