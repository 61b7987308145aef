"""The figures of a comparison of two checkpoints, as rows and tables."""

from collections.abc import Sequence

from rich.console import RenderableType

from ray_probe.report.column_layout import Column, FittedTable, Rank
from ray_probe.report.number_format import NOT_AVAILABLE, number, percent, with_error
from ray_probe.report.table_parts import Row, below
from ray_probe.run.comparison.change import AtBoth, Change, ChangeFigure, ChangePart, Figure

NATS = "nats a response"


def change_rows(change: Change) -> list[Row]:
    """Return the change and its two parts, the entropies and the lengths."""
    return [
        ("Change", "of entropy", _nats(change.total), "± one standard error, prompts as clusters"),
        ("", "pathwise", _nats(change.pathwise), "at the states visited"),
        ("", "visitation", _nats(change.visitation), "through which states are visited"),
        ("", "per token", f"{_signed(change.per_token.change)} nats", "of E[sum of H] / E[T]"),
        ("", "length", f"{_signed(change.length.change)} tokens", "of a response"),
        *_at_both("Entropy", change),
    ]


def change_details(change: Change) -> list[Row]:
    """Return intervals, errors for these very prompts, distances and shares."""
    kl, outside, truncated = change.kl, change.outside, change.truncated
    these = "± one standard error for these very prompts"
    return [
        ("Change", "total, interval", f"{_ends(change.total)} {NATS}", f"95 %, {number(change.clusters)} prompts"),
        ("", "pathwise, interval", f"{_ends(change.pathwise)} {NATS}", ""),
        ("", "visitation, interval", f"{_ends(change.visitation)} {NATS}", ""),
        ("", "these prompts", _within(change.pathwise), f"pathwise, {these}"),
        *_pair("Tokens", "entropy", change.per_token, "nats a token"),
        *_pair("Length", "of a response", change.length, "tokens"),
        ("Distance", "Jensen-Shannon", f"{number(change.js, 3)} nats", "of responses; log 2 = 0.693 at most"),
        ("", "KL of A to B", _divergence(kl.ab), "infinite: B cannot give some response of A"),
        ("", "KL of B to A", _divergence(kl.ba), ""),
        ("", "sample share", number(change.effective_sample_share, 2), "effective size of A's responses for B"),
        ("", "A outside B", percent(outside.a_of_b, 1), "of A's tokens, outside B's nucleus"),
        ("", "B outside A", percent(outside.b_of_a, 1), "of B's tokens, outside A's nucleus"),
        ("", "truncated", f"{percent(truncated.a, 1)}, {percent(truncated.b, 1)}", "of A's and of B's responses"),
        ("", "moved", percent(change.moved_share, 1), "of the parameters"),
    ]


def change_tables(change: Change) -> list[RenderableType]:
    """Return where the change is made: by position and by the token's entropy."""
    positions = [(f"{part.first:g} to {part.last - 1:g}", part) for part in change.positions]
    levels = [(_level(part), part) for part in change.token_entropy]
    tables = [
        below(_parts_table("Change by position", positions)),
        below(_parts_table("Change by the token's entropy, nats", levels)),
    ]
    return [*tables, below(_update_table(change))] if change.parts else tables


def _update_table(change: Change) -> FittedTable:
    """Return the parts of the update, to first order, and what they leave out."""
    columns = [Column("Change by part of the update", prefers=30, least=12), Column(NATS, right=True)]
    rows = [(f"  {part.group}", with_error(part.value, part.se, plus=True)) for part in change.parts]
    return FittedTable(columns, [*rows, ("  remainder", _signed(change.remainder))])


def _parts_table(title: str, parts: Sequence[tuple[str, ChangePart]]) -> FittedTable:
    columns = [
        Column(title, prefers=30, least=12), Column(NATS, right=True),
        Column("tokens", right=True, rank=Rank.SECONDARY),
    ]  # fmt: skip
    rows = [(f"  {name}", with_error(part.value, part.se, plus=True), number(part.tokens)) for name, part in parts]
    return FittedTable(columns, rows)


def _level(part: ChangePart) -> str:
    return "no choice" if part.first == part.last else f"{number(part.first, 2)} to {number(part.last, 2)}"


def _at_both(section: str, change: Change) -> list[Row]:
    entropies = (("at A", change.entropy_a), ("at B", change.entropy_b))
    return [
        (section if name == "at A" else "", name, f"{with_error(figure.value, figure.se)} nats", "per response")
        for name, figure in entropies
    ]


def _pair(section: str, name: str, both: AtBoth, unit: str) -> list[Row]:
    return [
        (section, f"{name} at A", f"{with_error(both.a.value, both.a.se)} {unit}", ""),
        ("", f"{name} at B", f"{with_error(both.b.value, both.b.se)} {unit}", ""),
    ]


def _nats(figure: Figure) -> str:
    return f"{_signed(figure)} nats"


def _signed(figure: Figure) -> str:
    return with_error(figure.value, figure.se, plus=True)


def _within(figure: ChangeFigure) -> str:
    return f"{with_error(figure.value, figure.se_within, plus=True)} nats"


def _divergence(value: float | None) -> str:
    return "infinite" if value is None else f"{number(value, 3)} nats"


def _ends(figure: ChangeFigure) -> str:
    if figure.interval is None:
        return NOT_AVAILABLE
    return f"{number(figure.interval[0], 3)} to {number(figure.interval[1], 3)}"
