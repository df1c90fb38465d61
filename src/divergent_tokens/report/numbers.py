"""Numbers as people read them: three digits, an interval beside, a dash where nothing is known."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

BARS = "▁▂▃▄▅▆▇█"
MISSING = "–"


def number(value: float | None, digits: int = 3) -> str:
    """About three significant digits, without an exponent where that is short enough.

    >>> [number(x) for x in (52.3456, 0.020182, 0.00282577, 1e-12, 0, None)]
    ['52.3', '0.0202', '0.00283', '1.0e-12', '0', '–']
    """
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if size < -4 or size > 5:
        return f"{value:.1e}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def percent(share: float | None) -> str:
    """A share as a percentage.

    >>> [percent(x) for x in (0.0202, 0.5, 0.00012, 0, 1, None)]
    ['2.02%', '50.0%', '0.012%', '0%', '100%', '–']
    """
    if share is None:
        return MISSING
    if share in (0, 1):
        return f"{share:.0%}"
    return f"{100 * share:.{1 if share >= 0.1 else 2 if share >= 0.001 else 3}f}%"


def estimate(value: Mapping[str, Any] | None, *, as_percent: bool = False) -> tuple[str, str]:
    """An ESTIMATE as its value, and its interval in brackets ("" where there is none)."""
    if value is None or value["value"] is None:
        return MISSING, ""
    form = percent if as_percent else number
    low, high = value["low"], value["high"]
    if low is None and high is None:
        return form(value["value"]), ""
    above = MISSING if high is None else form(high)
    return form(value["value"]), f"[{form(low)}, {above}]"


def sparkline(survival: Sequence[Sequence[float]], length: float, width: int = 12) -> str:
    """S(t) at `width` steps over the completions' length, from rows [t, S, low, high] at its changes."""
    shares = []
    for step in range(width):
        t = (step + 0.5) / width * length
        before = [row[1] for row in survival if row[0] <= t]
        shares.append(before[-1] if before else 1.0)
    return "".join(BARS[min(len(BARS) - 1, int(share * len(BARS)))] for share in shares)
