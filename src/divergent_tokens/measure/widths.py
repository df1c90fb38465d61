"""How narrow an interval should be: `fdt=10` in tokens, `kl=25%` of the value."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from divergent_tokens.errors import DivergentTokensError

UNITS = {"fdt": "tokens", "sdt": "a share of tokens", "kl": "nats per token"}
"""What can be planned for: the metrics that candidates are ranked and reported by."""
DEFAULTS = ("fdt=10", "sdt=25%", "kl=25%")
"""Asked for where nothing is: FDT is read in tokens, the others in proportion."""


@dataclass(frozen=True)
class Width:
    """From an interval's low bound to its high one, at most."""

    metric: str
    size: float
    """In the metric's unit, or a share of the metric's value."""
    relative: bool
    """Whether `size` is a share of the value."""

    def of(self, value: float) -> float:
        """The width in the metric's unit, where the metric has this value."""
        return self.size * value if self.relative else self.size

    def __str__(self) -> str:
        """As it can be typed."""
        scaled = 100 * self.size if self.relative else self.size
        short = f"{scaled:g}"
        number = short if float(short) == scaled else repr(scaled)
        return f"{self.metric}={number}{'%' if self.relative else ''}"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return vars(self)


def parse_width(text: str) -> Width:
    """The width that `METRIC=NUMBER` or `METRIC=NUMBER%` asks for.

    >>> parse_width("kl=25%")
    Width(metric='kl', size=0.25, relative=True)
    """
    name, _, number = (part.strip() for part in text.partition("="))
    metric, relative = name.lower(), number.endswith("%")
    if metric not in UNITS:
        raise DivergentTokensError(
            f"--width {text!r} is of {name!r}; expected one of {', '.join(UNITS)}, as in fdt=10 or "
            "kl=25%"
        )
    try:
        size = float(number.removesuffix("%"))
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise DivergentTokensError(
            f"--width {text!r}; expected a number above 0, in {UNITS[metric]} or with % of the "
            f"value, as in {metric}={'10' if metric == 'fdt' else '25%'}"
        )
    if metric == "sdt" and not relative and size >= 1:
        raise DivergentTokensError(
            f"--width {text!r} is wider than all that SDT can be, 0 to 1; for {number} % of its "
            f"value write sdt={number}%"
        )
    return Width(metric, size / 100 if relative else size, relative)


def parse_widths(texts: Sequence[str], *, new_tokens: int) -> tuple[Width, ...]:
    """One width a metric, in the order given; the defaults where nothing is given.

    Raises DivergentTokensError for two of one metric, and for an FDT as wide as the longest
    completion, `new_tokens`: every interval is narrower than that.
    """
    widths = tuple(map(parse_width, texts or DEFAULTS))
    for i, width in enumerate(widths):
        if width.metric in [before.metric for before in widths[:i]]:
            raise DivergentTokensError(f"--width names {width.metric} twice; give one width of it")
        if texts and width.metric == "fdt" and not width.relative and width.size >= new_tokens:
            raise DivergentTokensError(
                f"--width {width} is no narrower than all that FDT can be with {new_tokens} new "
                "tokens; ask for less, or try more --new-tokens"
            )
    return widths
