"""One claim of the paper: what committed results say of it, and a verdict by a rule.

A claim reads `Results` and nothing else. Its rule stands beside its verdict, so that a reader can
apply it by hand. Estimates are dictionaries with value, low and high, as in the results.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drawing import Chart, Point

from divergent_tokens.report.numbers import estimate

HOLDS, IN_PART, NOT, UNKNOWN = "holds", "holds in part", "does not hold", "not measured yet"
Estimate = Mapping[str, Any]
Results = Callable[[str], dict[str, Any] | None]
"""From a result's name to what benchmarks/results/NAME.json holds; None where there is no file."""


@dataclass(frozen=True)
class Claim:
    """One claim, what was found, and what that makes of it."""

    title: str
    said: str
    rule: str
    verdict: str
    found: tuple[str, ...]
    """Paragraphs and tables in Markdown."""
    limits: str
    results: tuple[str, ...]
    """Names of the results files."""
    figures: tuple[tuple[str, Chart], ...] = ()
    """File names and what they show."""


def reader(folder: Path) -> Results:
    """Results of a folder; each must be there but where a claim can do without."""

    def read(name: str) -> dict[str, Any] | None:
        path = folder / f"{name}.json"
        return json.loads(path.read_text("utf-8")) if path.exists() else None

    return read


def needed(results: Results, name: str) -> dict[str, Any]:
    """A result that has to be there."""
    found = results(name)
    if found is None:
        raise FileNotFoundError(f"benchmarks/results/{name}.json is not there; run its benchmark")
    return found


def apart(a: Estimate, b: Estimate) -> bool:
    """Whether two intervals do not overlap."""
    return bool(a["low"] > b["high"] or b["low"] > a["high"])


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def with_interval(value: Estimate, *, as_percent: bool = False) -> str:
    text, interval = estimate(value, as_percent=as_percent)
    return f"{text} ({interval})"


def point(x: float, value: Estimate) -> Point:
    return Point(x, value["value"], value["low"], value["high"])
