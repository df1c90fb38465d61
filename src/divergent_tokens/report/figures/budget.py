"""What every budget buys, by the sensitivities of a sweep, with what was measured beside it."""

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from divergent_tokens.report.figures.figure import (
    FLOOR,
    Figure,
    Trace,
    View,
    axis,
    error,
    faint,
    label,
    layout,
    shown,
    symbol,
)
from divergent_tokens.report.numbers import in_words, number, percent
from divergent_tokens.report.tables import Record

METRICS = (("fdt", "FDT"), ("sdt", "SDT"), ("kl", "KL"))
LINE = "#3b82c4"
MEASURED = "#e08214"


@dataclass(frozen=True)
class Measured:
    """A plan that was measured as a whole."""

    name: str
    share: float
    """Of the base's bytes."""
    metrics: Record
    order: str
    """By what it was chosen: those in another order than KL lie off the line for that reason."""


def budget(sweep: Record, measured: Sequence[Measured], name: str) -> Figure:
    """FDT, SDT and KL against the share of bytes; views of one metric each."""
    base = sum(component["base_size_bytes"] for component in sweep["components"])
    shares = [point["size_bytes"] / base for point in sweep["frontier"]]
    kls = [point["kl"] for point in sweep["frontier"]]
    found: dict[str, list[tuple[float | None, ...]]] = {"kl": [(kl, kl, kl) for kl in kls]}
    found["sdt"], found["fdt"] = ([_at(sweep, kl, column) for kl in kls] for column in (1, 4))
    data: list[Trace] = []
    views = []
    for metric, title in METRICS:
        first = len(data)
        data += list(_predicted(metric, shares, found[metric]))
        data.append(_marker())
        data += list(_measured(metric, measured))
        views.append(View(title, tuple(range(first, len(data))), {"yaxis": _y(metric)}))
    return Figure(
        name=name,
        title="What a budget buys",
        caption=(
            "Line: predicted from the sweep, each component by the scheme that does the least harm "
            "in all. Band: where a measurement should fall. Points: plans that were measured. "
            "The KLs are summed over the prompts that choose, so a plan on other prompts shows a "
            "little more; above a KL of 0.3 there is no prediction."
        ),
        alt=_alt(shares, found),
        data=data,
        layout=layout(axis("share of the base's bytes", tickformat=".0%"), _y("fdt")),
        columns=("bytes", "KL", "SDT", "FDT", ""),
        rows=[*_lines(shares, found), *map(_row, measured)],
        views=views,
    )


def _y(metric: str) -> Record:
    if metric == "kl":
        return axis("KL, nats per token", type="log", exponentformat="power", dtick=1)
    if metric == "sdt":
        return axis(
            "share of divergent tokens", rangemode="tozero", tickformat=".1~%", type="linear"
        )
    return axis("tokens until they part", rangemode="tozero", type="linear", tickformat="")


def _at(sweep: Record, kl: float, column: int) -> tuple[float | None, ...]:
    """A metric and its bounds by the law's table, between two of its rows; None above its range."""
    table = sweep["table"]
    if kl > table[-1][0]:
        return None, None, None
    i = bisect.bisect_left([row[0] for row in table], kl)
    if i == 0:
        return tuple(table[0][column : column + 3])
    low, high = table[i - 1], table[i]
    part = math.log(kl / low[0]) / math.log(high[0] / low[0])
    return tuple((1 - part) * low[c] + part * high[c] for c in range(column, column + 3))


def _predicted(
    metric: str, shares: Sequence[float], found: Sequence[tuple[float | None, ...]]
) -> Iterator[Trace]:
    known = [(x, y) for x, y in zip(shares, found, strict=True) if y[0] is not None]
    if metric == "kl":
        known = [(x, y) for x, y in known if y[0]]
    xs = [x for x, _ in known]
    if metric != "kl":
        yield {
            "type": "scatter",
            "mode": "lines",
            "x": [*xs, *reversed(xs)],
            "y": [*(y[2] for _, y in known), *(y[1] for _, y in reversed(known))],
            "fill": "toself",
            "fillcolor": faint(LINE, 0.13),
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
        }
    form = percent if metric == "sdt" else number
    yield {
        "type": "scatter",
        "mode": "lines",
        "name": "predicted",
        "x": xs,
        "y": [y[0] for _, y in known],
        "line": {"color": LINE, "width": 2.4},
        "hoverinfo": "text",
        "text": [f"{percent(x)} of the bytes: {metric.upper()} {form(y[0])}" for x, y in known],
    }


def _marker() -> Trace:
    """Where the slider stands; the page's script moves it."""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "the slider",
        "meta": "slider",
        "x": [],
        "y": [],
        "marker": {"color": LINE, "size": 15, "symbol": "circle-open", "line": {"width": 3}},
        "hoverinfo": "skip",
    }


def _measured(metric: str, measured: Sequence[Measured]) -> Iterator[Trace]:
    """A trace for each order, with what was chosen by KL first."""
    for i, order in enumerate(dict.fromkeys(one.order for one in measured)):
        own = [one for one in measured if one.order == order and one.metrics[metric]]
        found = [one.metrics[metric] for one in own]
        yield {
            "type": "scatter",
            "mode": "markers",
            "name": f"measured, {label(order)}",
            "x": [one.share for one in own],
            "y": [one["value"] for one in found],
            "error_y": error(found),
            "marker": {"color": MEASURED if i == 0 else FLOOR, "symbol": symbol(i + 1), "size": 9},
            "hoverinfo": "text",
            "text": [
                f"{shown(one.name)}: {metric.upper()} "
                + in_words(value, as_percent=metric == "sdt")
                for one, value in zip(own, found, strict=True)
            ],
        }


def _lines(
    shares: Sequence[float], found: Mapping[str, Sequence[tuple[float | None, ...]]]
) -> Iterator[list[str]]:
    for share, kl, sdt, fdt in zip(shares, found["kl"], found["sdt"], found["fdt"], strict=True):
        yield [percent(share), number(kl[0]), percent(sdt[0]), number(fdt[0]), "predicted"]


def _row(one: Measured) -> list[str]:
    cells = (in_words(one.metrics[m], as_percent=m == "sdt") for m in ("kl", "sdt", "fdt"))
    return [percent(one.share), *cells, f"measured: {one.name}"]


def _alt(shares: Sequence[float], found: Mapping[str, Sequence[tuple[float | None, ...]]]) -> str:
    steps = sorted({0, len(shares) // 4, len(shares) // 2, 3 * len(shares) // 4})
    return "; ".join(
        f"at {percent(shares[i])} of the bytes KL {number(found['kl'][i][0])}, "
        f"SDT {percent(found['sdt'][i][0])}, FDT {number(found['fdt'][i][0])}"
        for i in steps
    )
