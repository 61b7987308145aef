"""Numbers as text: significant digits, errors, shares; a missing number is `n/a`."""

import math

NOT_AVAILABLE = "n/a"


def is_missing(value: float | None) -> bool:
    """Return whether the value is None or NaN."""
    return value is None or math.isnan(value)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with `digits` significant digits; an integer is whole."""
    if value is None or math.isnan(value):
        return NOT_AVAILABLE
    if isinstance(value, int):
        return f"{value:,}"
    if math.isinf(value) or value == 0:
        return f"{value:g}"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - _exponent(value))}f}"


def signed(value: float | None, digits: int = 4) -> str:
    """Return a number with its sign."""
    text = number(value, digits)
    return text if value is None or is_missing(value) or value < 0 else f"+{text}"


def with_error(value: float | None, se: float | None, plus: bool = False) -> str:
    """Return `value ± se`, both to the second significant digit of the error.

    Args:
        value: the figure.
        se: its error.
        plus: write the sign of a positive figure too.
    """
    if plus and value is not None and value > 0:
        return f"+{with_error(value, se)}"
    if value is None or se is None or math.isnan(value) or not math.isfinite(se) or se == 0:
        return NOT_AVAILABLE if is_missing(value) else f"{number(value)} ± {number(se)}"
    decimals = 1 - _exponent(se)
    if decimals > 6 or not 1e-3 <= max(abs(value), se) < 1e6:
        return f"{value:.{max(0, min(6, _exponent(value or se) + decimals))}e} ± {se:.1e}"
    return f"{value:,.{max(0, decimals)}f} ± {se:,.{max(0, decimals)}f}"


def count(amount: int, noun: str) -> str:
    """Return an amount with its noun: `1 shard`, `2 shards`."""
    return f"{number(amount)} {noun}{'' if amount == 1 else 's'}"


def about(value: float | None) -> str:
    """Return a rough count with two significant digits: `about 1,500`."""
    if value is None or not math.isfinite(value):
        return NOT_AVAILABLE
    rounded = float(f"{max(value, 1.0):.1e}")
    return f"about {rounded:,.0f}" if rounded < 1e9 else f"about {rounded:.1e}"


def percent(part: float | None, whole: float | None) -> str:
    """Return a share in percent with two significant digits; `n/a` of 0."""
    if part is None or not whole or math.isnan(part) or math.isnan(whole):
        return NOT_AVAILABLE
    share = 100.0 * part / whole
    return f"{share:.0f} %" if share == 0 or share >= 9.95 else f"{share:.2g} %"


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value)))
