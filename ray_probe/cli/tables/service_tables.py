"""Answers of a service or a run as tables for a terminal."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from ray_probe.controller.replies import BetaReply, MeasurementInfo, Status, Variance
from ray_probe.core.estimator.modes import MODES
from ray_probe.errors import ShardError
from ray_probe.report.caveats import ill_conditioned, shard_name, worse_baseline
from ray_probe.report.column_layout import Cell, Column, FittedTable, Prose, Rank
from ray_probe.report.number_format import NOT_AVAILABLE, count, number, with_error
from ray_probe.report.result_table import beta_values, fit_lines, mode_name, ratio_to_none, through
from ray_probe.report.table_parts import (
    Row,
    below,
    duration,
    figures,
    gradient_rows,
    norm_debiased,
    page,
    shown_path,
    utc,
    warned,
)
from ray_probe.run.comparison.change import ChangeFigure
from ray_probe.run.progress import Progress
from ray_probe.run.result import EXIT_PARTIAL, Entropy, Gradient

STYLES = {
    "measuring": "bold cyan", "running": "bold cyan", "idle": "green", "done": "green", "failed": "bold red",
    "cancelled": "yellow", "closing": "yellow",
}  # fmt: skip
EXIT_CODES = {
    ShardError.exit_code: "shards came twice with different bytes, see conflicts in result.json",
    EXIT_PARTIAL: "PARTIAL: some shards were given up, see partial in result.json",
}
ATTENTION = "read this"
LISTED = 12
OTHERS_SHOWN = 4


def status_table(status: Status, now: datetime | None = None) -> RenderableType:
    """Return the state of a service or a run, problems at the end.

    Args:
        status: its answer.
        now: with time zone; None: the clock's time.
    """
    since = datetime.fromisoformat(status.since)
    up_s = max(0.0, ((now or datetime.now(UTC)) - since).total_seconds())
    heading = Text.assemble(
        (status.name, "bold"), f"   {status.kind}   ", (status.state, STYLES.get(status.state, ""))
    )
    lines = [f"up {duration(up_s)}, since {utc(status.since)} UTC", f"namespace {status.namespace}"]
    lines.append(f"directory {shown_path(status.directory)}")
    draining = [Text("DRAINING: takes nothing new", "bold yellow")] if status.draining else []
    parts: list[RenderableType] = [heading, *(Prose(line, "dim") for line in lines), *draining]
    parts.append(figures([_asked(status)]))
    if status.actors:
        parts.append(_actors(status))
    parts += [*_work(status), figures(_queue(status) + _cluster(status)), *warned(_wrong(status), ATTENTION)]
    return page(*parts)


def beta_table(beta: BetaReply) -> RenderableType:
    """Return a version of the fitted baseline, feature by feature."""
    wrong = [warning for warning in [ill_conditioned(beta)] if warning is not None]
    if beta.values is None:
        why = "the solve failed" if beta.tokens else "there is no token to fit on"
        wrong.insert(0, f"FALLBACK: beta could not be fitted, {why}; {beta.fallback} replaces it.")
    return page(
        Prose(f"{beta.measurement}: beta version {beta.version}, {through(beta.round)}", "bold"),
        below(beta_values("Feature", beta)),
        *map(Prose, fit_lines(replace(beta, fallback=None))), Prose(f"policy {beta.policy_id}", "dim"),
        *warned(wrong, ATTENTION),
    )  # fmt: skip


def variance_table(variance: Variance) -> RenderableType:
    """Return advantage statistics by baseline, and the noise of the gradient."""
    if variance.rounds:
        found = (
            f"{count(variance.rounds, 'whole round')}, {number(variance.sequences)} responses, "
            f"{number(variance.tokens)} tokens, beta version {number(variance.beta_version)}"
        )
    else:
        found = "no whole round yet: estimates come with the first"
    parts: list[RenderableType] = [Prose(f"{variance.measurement}: {found}", "bold")]
    own = any(value is not None for value in variance.in_sample.values())
    if variance.rounds or own:
        parts.append(_modes(variance, own))
    if own:
        newest = number(variance.in_sample_version)
        said = f"in-sample: mean square of version {newest} on the very records it was fitted on"
        parts.append(Prose(said, "dim"))
    if variance.rounds and variance.features:
        parts.append(Prose(f"regression reads {', '.join(variance.features)}", "dim"))
    if variance.rounds:
        parts.append(figures(gradient_rows(variance.gradient or Gradient(), "of the mean, times responses")))
    worse = worse_baseline(variance.mode, variance.advantage_paired)
    return page(*parts, *warned([] if worse is None else [worse], ATTENTION))


def results_table(items: Sequence[MeasurementInfo]) -> RenderableType:
    """Return a row a measurement; below, why measurements failed."""
    if not items:
        return Prose("no measurement yet; queue one: probe CHECKPOINT")
    compared = any(item.against is not None for item in items)
    in_series = any(item.series is not None or item.step is not None for item in items)
    columns = [*_RESULT_COLUMNS[:2], *([_SERIES_COLUMN] if in_series else []), *_RESULT_COLUMNS[2:6]]
    columns += [*([_CHANGE_COLUMN] if compared else []), *_RESULT_COLUMNS[6:]]
    table = FittedTable(columns, [_result_row(item, compared, in_series) for item in items], gap=1)
    lost = any(item.gradient is not None and norm_debiased(item.gradient) is None for item in items)
    mark = [Prose("norm_debiased n/a: not above the noise, or not known", "dim")] if lost else []
    ends = [Prose(line, style) for line, style in filter(None, map(_end, items))]
    return page(table, *mark, *ends)


_RESULT_COLUMNS = (
    Column("id", least=8), Column("checkpoint", least=12), Column("state"),
    Column("rounds", right=True, rank=Rank.SECONDARY), Column("responses", right=True, rank=Rank.SECONDARY),
    Column("entropy,\nnats", right=True), Column("norm_debiased", right=True), Column("snr", right=True),
    Column("when, UTC", rank=Rank.SECONDARY),
)  # fmt: skip


_CHANGE_COLUMN = Column("change,\nnats", right=True)
_SERIES_COLUMN = Column("series,\nstep", least=8)


def _asked(status: Status) -> Row:
    asked, alive, starting = status.actors_asked, status.actors_alive, status.actors_starting
    missing, leaving = max(0, asked - alive - starting), max(status.actors_leaving, alive - asked)
    notes = [f"{starting} loading"] if starting else []
    notes += [f"{missing} missing"] if missing else []
    notes += [f"{leaving} too many, to leave when nothing depends on them"] if leaving else []
    return "Actors", Text(f"asked {asked}, have {alive}", "bold red" if missing else ""), "", ", ".join(notes)


def _actors(status: Status) -> RenderableType:
    placed = [actor for actor in status.actors if actor.pid is not None]
    others = [actor for actor in status.actors if actor.pid is None]
    rows: list[list[Cell]] = []
    for actor in [*placed, *others[:OTHERS_SHOWN]]:
        node, pid = actor.node or NOT_AVAILABLE, NOT_AVAILABLE if actor.pid is None else str(actor.pid)
        rows.append([f"actor {actor.number}", shard_name(actor.state), node, pid, number(actor.tokens)])
    table = below(FittedTable(_ACTOR_COLUMNS, rows))
    if len(others) <= OTHERS_SHOWN:
        return table
    return Group(table, Prose(f"{len(others) - OTHERS_SHOWN} more are starting or wait for room", "dim"))


_ACTOR_COLUMNS = (
    Column("Actor", prefers=9), Column("state", least=17), Column("node", least=16, rank=Rank.SECONDARY),
    Column("pid", right=True, rank=Rank.SECONDARY), Column("tokens", right=True),
)  # fmt: skip


def _work(status: Status) -> list[RenderableType]:
    info, progress = status.measurement, status.progress
    if info is None:
        ask = status.kind == "service" and not status.queued and not status.draining
        return [figures([("Work", "none", "queue one: probe CHECKPOINT" if ask else "", "")])]
    adapter = "" if info.adapter is None else f" + {shown_path(info.adapter)}"
    adapter += "" if info.against is None else f" against {shown_path(info.against)}"
    heading = Prose(f"{shown_path(info.checkpoint)}{adapter}", label=Text(f"{info.id}   ", "bold"))
    rows: list[Row] = _progress(progress) if progress else [("Work", "round", "before its first shard", "")]
    rows += [
        ("", "shards retried", number(status.shards_retried), "in whole rounds"),
        ("", "whole rounds", number(info.rounds), "so far"),
        ("", "responses", number(info.sequences), "in whole rounds"),
    ]
    if info.change is not None:
        rows.append(("", "change", f"{with_error(info.change.value, info.change.se, plus=True)} nats", "per response"))
    if info.entropy is not None:
        rows.append(("", "entropy", f"{_entropy(info)} nats", "per response"))
    return [below(heading), figures(rows)]


def _progress(progress: Progress) -> list[Row]:
    at, of = progress.round + 1, progress.rounds
    speed = progress.tokens / progress.elapsed_s if progress.elapsed_s > 0 else None
    return [
        ("Work", "round", f"{at}, until a budget ends it" if of is None else f"{at} of {of}", ""),
        ("", "records", f"{progress.collected}/{progress.shards}", "shards of this round"),
        ("", progress.summed, f"{progress.accumulated}/{progress.shards}", "shards of this round"),
        ("", "speed", f"{number(speed, 3)} tokens/s", ""),
        ("", "sampled", f"{number(progress.tokens)} tokens", "since it began or went on"),
        ("", "beta", f"version {progress.version}" if progress.version else "none yet", ""),
        ("", "variance ratio", number(progress.variance_ratio, 3), "mean square, baseline in use to none, so far"),
    ]


def _queue(status: Status) -> list[Row]:
    ids = ", ".join(status.queued[:LISTED])
    if len(status.queued) > LISTED:
        ids += f" and {len(status.queued) - LISTED} more"
    waiting: list[Row] = [("Queue", "waiting", f"{len(status.queued)}", ids)]
    return [*waiting, ("", "ended", number(status.ended), "")]


def _cluster(status: Status) -> list[Row]:
    names = ["CPU", "GPU", *sorted(set(status.resources) - {"CPU", "GPU"})]
    shares = [f"{status.free.get(name, 0.0):g} of {status.resources.get(name, 0.0):g} free" for name in names]
    rows: list[Row] = [("Cluster", "nodes", number(status.nodes), "")]
    return rows + [("", name, share, "") for name, share in zip(names, shares, strict=True)]


def _wrong(status: Status) -> list[str]:
    problem = [] if status.problem is None else [f"PROBLEM: {status.problem}"]
    failure = [] if status.last_failure is None else [f"LAST FAILURE: {status.last_failure}"]
    return [*problem, *failure, *status.warnings]


def _modes(variance: Variance, own: bool) -> RenderableType:
    """Return a row a baseline; `own` adds the newest fit on its own data."""
    square, ratios = variance.advantage_mean_square or {}, variance.advantage_mean_square_ratio or {}
    titles = ["mean square,\nnats² a token", "ratio to none", "variance,\nnats² a token"] if variance.rounds else []
    if own:
        titles.append("in-sample,\nflattering")
    rows = []
    for mode in MODES:
        name, style = mode_name(mode, variance.mode)
        spread = number((variance.advantage_variance or {}).get(mode))
        cells = [number(square.get(mode)), ratio_to_none(mode, ratios), spread] if variance.rounds else []
        flattering = [number(variance.in_sample.get(mode))] if own else []
        rows.append([Text(cell, style) for cell in (name, *cells, *flattering)])
    columns = [Column("Advantage", prefers=24), *(Column(title, right=True, prefers=14) for title in titles)]
    return below(FittedTable(columns, rows))


def _result_row(item: MeasurementInfo, compared: bool, in_series: bool) -> list[Cell]:
    gradient, change = item.gradient or Gradient(), item.change or ChangeFigure()
    checkpoint = "/".join(Path(item.checkpoint).parts[-2:])
    checkpoint += "" if item.adapter is None else f"\n+ {Path(item.adapter).name}"
    checkpoint += "" if item.against is None else f"\nagainst {'/'.join(Path(item.against).parts[-2:])}"
    changed = [with_error(change.value, change.se, plus=True)] if compared else []
    step = "" if item.step is None else f"step {item.step}"
    place = ["\n".join(filter(None, (item.series, step)))] if in_series else []
    return [
        item.id, checkpoint, *place, Text(item.state, STYLES.get(item.state, "")), number(item.rounds),
        number(item.sequences), _entropy(item), *changed, number(norm_debiased(gradient), 3), number(gradient.snr, 3),
        utc(item.finished or item.started or item.submitted)[5:16],
    ]  # fmt: skip


def _entropy(item: MeasurementInfo) -> str:
    entropy = item.entropy or Entropy()
    return with_error(entropy.per_sequence, entropy.per_sequence_se)


def _end(item: MeasurementInfo) -> tuple[str, str] | None:
    """Return a line on a measurement that failed, and its style; else None."""
    cause = item.cause or EXIT_CODES.get(item.exit_code or 0)
    if cause is None:
        return None
    return f"{item.id}{' failed' if item.state == 'failed' else ''}: {cause}", STYLES.get(item.state, "")
