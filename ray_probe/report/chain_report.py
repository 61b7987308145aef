"""A chain of comparisons as a table, as rows of figures and as a plot."""

from collections.abc import Sequence

from rich.console import RenderableType

from ray_probe.report.column_layout import Column, FittedTable, Prose, Rank
from ray_probe.report.export import csv_text, markdown_table
from ray_probe.report.number_format import with_error
from ray_probe.report.table_parts import below, page
from ray_probe.run.comparison.chain import Chain, names_of
from ray_probe.run.comparison.change import Figure

COLUMNS = ("total", "pathwise", "visitation", "per_token", "since_first", "entropy")


def chain_table(chain: Chain) -> RenderableType:
    """Return a row a step: the change, its parts, and what has changed in all."""
    first = chain.entropy_first
    columns = [
        Column("step", least=10), Column("change,\nnats a response", right=True),
        Column("at the states\nvisited", right=True, rank=Rank.SECONDARY),
        Column("which states\nare visited", right=True, rank=Rank.SECONDARY),
        Column("change,\nnats a token", right=True, rank=Rank.SECONDARY),
        Column("since the\nfirst", right=True), Column("entropy,\nnats", right=True),
    ]  # fmt: skip
    names = names_of([chain.steps[0].a, *(step.b for step in chain.steps)])
    rows = [
        [f"{before} to\n{after}", *(_signed(getattr(step, name)) for name in COLUMNS[:-1]), _plain(step.entropy)]
        for before, after, step in zip(names, names[1:], chain.steps, strict=False)
    ]
    start = f"entropy of a response at {names[0]}: {_plain(first)} nats; {chain.rounds} rounds of every step"
    note = "± one standard error, prompts as clusters; errors of sums come from the sums of each prompt over the steps"
    return page(Prose("Change of the entropy of responses along a chain", "bold"), Prose(start), below(
        FittedTable(columns, rows, gap=1)), Prose(note, "dim"))  # fmt: skip


def chain_rows(chain: Chain) -> tuple[tuple[str, ...], list[tuple[str | float | None, ...]]]:
    """Return the names of the columns, and a row a step with every digit."""
    named = tuple(key for name in COLUMNS for key in (name, f"{name}_se"))
    rows = []
    for step in chain.steps:
        found = [getattr(step, name) for name in COLUMNS]
        rows.append((step.a, step.b, step.run, *(number for one in found for number in (one.value, one.se))))
    return ("a", "b", "run", *named), rows


def chain_csv(chain: Chain) -> str:
    """Return a line a step with every digit."""
    return csv_text(*chain_rows(chain))


def chain_markdown(chain: Chain) -> str:
    """Return a row a step with errors."""
    rows: Sequence[Sequence[str]] = [
        [step.a, step.b, *(with_error(one.value, one.se) for one in (getattr(step, name) for name in COLUMNS))]
        for step in chain.steps
    ]
    return markdown_table(("a", "b", *(f"{name}, nats" for name in COLUMNS)), rows)


def _signed(figure: Figure) -> str:
    return with_error(figure.value, figure.se, plus=True)


def _plain(figure: Figure) -> str:
    return with_error(figure.value, figure.se)
