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
    "flips",
)
"""What a condition can be about: the metrics of comparison.json that are one number, and flips."""
_HINTS = {"ppl": "give --text", "flips": "no task has a metric of right and wrong answers"}
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

    def holds(self, metrics: Mapping[str, Any]) -> bool | None:
        """Whether it is true of the METRICS of a candidate; None where that was not measured."""
        value = metric_value(metrics, self.metric)
        if value is None and self.metric == "median_fdt":
            value = float("inf")  # more than half of the prompts outlived their completions
        if value is None and self.metric == "near_ties" and metrics["identical"] == 1:
            return False  # measured: there is no divergence that could be one
        return None if value is None else OPERATORS[self.operator](value, self.bound)

    def __str__(self) -> str:
        """The condition as it can be typed."""
        short = f"{self.bound:g}"
        return f"{self.metric}{self.operator}{short if float(short) == self.bound else self.bound}"


@dataclass(frozen=True)
class Condition:
    """Comparisons that must all be true for the condition to be."""

    parts: tuple[Comparison, ...]

    def holds(self, metrics: Mapping[str, Any]) -> bool:
        """Whether it is true of the METRICS of a candidate.

        One false part decides. Otherwise a part on what was not measured is an error: a build must
        not pass because of it.
        """
        found = [part.holds(metrics) for part in self.parts]
        if False in found:
            return False
        if None in found:
            part = self.parts[found.index(None)]
            hint = _HINTS.get(part.metric, "it is null in comparison.json")
            raise DivergentTokensError(
                f"the condition {self} cannot be decided: {part.metric} was not measured ({hint})"
            )
        return True

    def found(self, metrics: Mapping[str, Any]) -> str:
        """What the metrics are that it is about, for a message."""
        names = dict.fromkeys(part.metric for part in self.parts)
        values = {name: metric_value(metrics, name) for name in names}
        return ", ".join(
            f"{name} is {'beyond the completions' if value is None else f'{value:.4g}'}"
            for name, value in values.items()
        )

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
        near = difflib.get_close_matches(metric.lower(), METRICS, n=1, cutoff=0)[0]
        raise DivergentTokensError(
            f"there is no metric {metric!r}; did you mean {near!r}? Known are {', '.join(METRICS)}"
        )
    try:
        bound = float(number)
    except ValueError:
        bound = float("nan")
    if bound != bound:  # also when somebody types nan, which nothing compares with
        raise DivergentTokensError(
            f"{number!r} in the condition {text.strip()!r} is no number; expected one such as 40, "
            "and a share such as 0.1 rather than 10%"
        )
    return Comparison(metric, sign, bound)


def metric_value(metrics: Mapping[str, Any], name: str) -> float | None:
    """A metric's number in the METRICS of comparison.json; for `ppl` the conventional one."""
    value = metrics[name]
    if name == "ppl" and value is not None:
        value = value["conventional"]
    number: float | None = value["value"] if isinstance(value, dict) else value
    return number


def largest_flips(candidate: Mapping[str, Any]) -> float | None:
    """The largest share of flips that a candidate of comparison.json has in any task."""
    shares = [task["flips"]["share"]["value"] for task in candidate["tasks"] or () if task["flips"]]
    return max(shares, default=None)
