"""Conditions on metrics, as in `fdt<40 and sdt>0.1`, for builds that should break."""

import difflib
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from divergent_tokens.errors import DivergentTokensError

METRICS = (
    "fdt",
    "median_fdt",
    "sdt",
    "dppl",
    "base_dppl",
    "ppl",
    "kl",
    "kl_p99",
    "acceptance",
    "near_ties",
    "identical",
    "mean_length",
    "repeated",
)
"""What a condition can be about: the metrics of comparison.json that are one number."""
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
}
_COMPARISON = re.compile(r"\s*([A-Za-z_]\w*)\s*(<=|>=|==|!=|<|>)\s*([^\s<>=!]+)\s*")


@dataclass(frozen=True)
class Comparison:
    """One metric against one number."""

    metric: str
    operator: str
    bound: float

    def holds(self, metrics: Mapping[str, Any]) -> bool:
        """Whether it is true of the METRICS of a candidate; an unmeasured metric is an error."""
        value = metric_value(metrics, self.metric)
        if value is None:
            hint = "give --text" if self.metric == "ppl" else "it is null in comparison.json"
            raise DivergentTokensError(
                f"the condition {self} cannot be decided: {self.metric} was not measured ({hint})"
            )
        return OPERATORS[self.operator](value, self.bound)

    def __str__(self) -> str:
        """The condition as it can be typed."""
        return f"{self.metric}{self.operator}{self.bound:g}"


@dataclass(frozen=True)
class Condition:
    """Comparisons that must all be true for the condition to be."""

    parts: tuple[Comparison, ...]

    def holds(self, metrics: Mapping[str, Any]) -> bool:
        """Whether it is true of the METRICS of a candidate."""
        return all([part.holds(metrics) for part in self.parts])

    def __str__(self) -> str:
        """The condition as it can be typed."""
        return " and ".join(map(str, self.parts))


def parse_condition(text: str) -> Condition:
    """A condition from `METRIC OPERATOR NUMBER`, several of them joined by `and`.

    >>> str(parse_condition("fdt < 40 and sdt>0.1"))
    'fdt<40 and sdt>0.1'
    """
    return Condition(tuple(_parse_comparison(part) for part in re.split(r"\band\b", text)))


def _parse_comparison(text: str) -> Comparison:
    match = _COMPARISON.fullmatch(text)
    if match is None:
        raise DivergentTokensError(
            f"{text.strip()!r} is no condition; expected a metric, one of {' '.join(OPERATORS)}, "
            "and a number, as in 'fdt<40 and sdt>0.1'"
        )
    metric, sign, number = match.groups()
    if metric not in METRICS:
        near = difflib.get_close_matches(metric.lower(), METRICS, n=1)
        raise DivergentTokensError(
            f"there is no metric {metric!r}"
            + (f"; did you mean {near[0]!r}?" if near else "")
            + f" Known are {', '.join(METRICS)}"
        )
    try:
        bound = float(number)
    except ValueError:
        bound = float("nan")
    if bound != bound:  # also when somebody types nan, which nothing compares with
        raise DivergentTokensError(f"{number!r} in the condition {text.strip()!r} is no number")
    return Comparison(metric, sign, bound)


def metric_value(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric's number in the METRICS of comparison.json; for `ppl` the conventional one."""
    value = metrics[name]
    if name == "ppl" and value is not None:
        value = value["conventional"]
    return value["value"] if isinstance(value, dict) else value
