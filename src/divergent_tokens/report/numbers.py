"""Numbers as people read them: three digits, an interval beside, a dash where nothing is known."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

BARS = "▁▂▃▄▅▆▇█"
MISSING = "–"
UNKNOWN = "?"
"""A bound that nothing is known of."""


def number(value: float | None, digits: int = 3) -> str:
    """About three significant digits, without an exponent where that is short enough.

    >>> [number(x) for x in (52.3456, 0.020182, 0.00282577, 9.9999, 1e-12, 0, None)]
    ['52.3', '0.0202', '0.00283', '10.0', '1.0e-12', '0', '–']
    """
    if value is None or math.isnan(value):
        return MISSING
    if value == 0:
        return "0"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = int(f"{value:.{digits - 1}e}".partition("e")[2])  # of the rounded: 9.9999 is 10.0
    if size < -4 or size > 5:
        return f"{value:.1e}"
    return f"{value:.{max(0, digits - 1 - size)}f}"


def percent(share: float | None, digits: int = 3) -> str:
    """A share as a percentage; near 100 % the digits count what is missing from it.

    >>> [percent(x) for x in (0.0202, 0.5, 0.514, 0.00012, 0, 1, 0.978, 0.99998, None)]
    ['2.02%', '50.0%', '51.4%', '0.012%', '0%', '100%', '97.8%', '99.998%', '–']
    >>> [percent(x) for x in (1e-9, 1 - 1e-9)]
    ['<0.001%', '>99.999%']
    """
    if share is None or math.isnan(share):
        return MISSING
    if share in (0, 1):
        return f"{share:.0%}"
    if not 0 < share < 1:  # no share at all
        return f"{number(100 * share, digits)}%"
    if share < 0.00001:
        return "<0.001%"
    if share > 0.99999:
        return ">99.999%"
    near_one = share > 0.5
    size = math.floor(math.log10(100 * min(share, 1 - share)))
    decimals = max(digits - 2, digits - size - (2 if near_one else 1))
    return f"{100 * share:.{min(max(decimals, 0), 3)}f}%"


def estimate(value: Mapping[str, Any] | None, *, as_percent: bool = False) -> tuple[str, str]:
    """An ESTIMATE as its value, and its interval; two digits a bound, more where alike."""
    if value is None or value["value"] is None:
        return MISSING, ""
    form = percent if as_percent else number
    low, high = value["low"], value["high"]
    # A zero with nothing known above it: "0–?" would say no more.
    if high is None and low in (None, value["value"]):
        return form(value["value"]), ""
    for digits in (2, 3, 4):
        below, above = (UNKNOWN if bound is None else form(bound, digits) for bound in (low, high))
        if below != above:
            break
    to = " to " if low is not None and low < 0 else "–"
    return form(value["value"]), f"{below.removesuffix('%')}{to}{above}"


def sparkline(survival: Sequence[Sequence[float]], length: float, width: int = 12) -> str:
    """S(t) at `width` steps over the completions' length; rows are [t, S, low, high] at changes."""
    shares = []
    for step in range(width):
        t = (step + 0.5) / width * length
        before = [row[1] for row in survival if row[0] <= t]
        shares.append(before[-1] if before else 1.0)
    return "".join(BARS[min(len(BARS) - 1, int(share * len(BARS)))] for share in shares)


def in_words(value: Mapping[str, Any] | None, *, as_percent: bool = False) -> str:
    """An ESTIMATE on one line, its interval in brackets."""
    found, interval = estimate(value, as_percent=as_percent)
    return f"{found} ({interval})" if interval else found
