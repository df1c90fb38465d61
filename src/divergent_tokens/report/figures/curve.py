"""The paper's figure: plans that convert more and more components, in each order."""

from collections.abc import Sequence

from divergent_tokens.report.figures.figure import (
    Figure,
    Trace,
    View,
    axis,
    colour,
    dash,
    error,
    label,
    layout,
    symbol,
)
from divergent_tokens.report.numbers import in_words, number, percent
from divergent_tokens.report.tables import Record, on_prompts

METRICS = (("fdt", "FDT"), ("sdt", "SDT"), ("kl", "KL"))
TITLES = {"fdt": "tokens until they part", "sdt": "share of divergent tokens", "kl": "KL, nats"}


def curve(points: Sequence[Record], name: str) -> Figure:
    """FDT, SDT and KL of each order against how many components are converted."""
    orders = list(dict.fromkeys(point["rank_by"] for point in points))
    data: list[Trace] = []
    views = []
    for metric, title in METRICS:
        first = len(data)
        for i, order in enumerate(orders):
            own = [point for point in points if point["rank_by"] == order]
            data.append(_line(order, i, own, metric))
        part = {"yaxis": _y(metric)}
        views.append(View(title, tuple(range(first, len(data))), part))
    prompts = points[0]["measured"]["prompts"]
    return Figure(
        name=name,
        title="Converting the k best components, in each order",
        caption=(
            "The base with k components compressed, the least harmful first by each order, "
            f"measured {on_prompts(prompts, prompts['new_tokens'])}. Higher FDT is closer."
        ),
        alt="; ".join(
            f"by {order}: " + ", ".join(_said(p) for p in points if p["rank_by"] == order)
            for order in orders
        ),
        data=data,
        layout=layout(axis("components converted, k", rangemode="tozero"), _y("fdt")),
        columns=("order", "k", "bytes", *(title for _, title in METRICS)),
        rows=[_row(point) for point in points],
        views=views,
    )


def _y(metric: str) -> Record:
    if metric == "kl":
        return axis(TITLES[metric], type="log", exponentformat="power", dtick=1)
    form = ".1~%" if metric == "sdt" else ""
    return axis(TITLES[metric], rangemode="tozero", tickformat=form, type="linear")


def _metrics(point: Record) -> Record:
    metrics: Record = point["measured"]["metrics"]
    return metrics


def _line(order: str, i: int, points: Sequence[Record], metric: str) -> Trace:
    found = [_metrics(point)[metric] for point in points]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": f"by {label(order)}",
        "x": [point["n_components"] for point in points],
        "y": [one["value"] for one in found],
        "error_y": error(found),
        "line": {"color": colour(i), "dash": dash(i), "width": 2.2},
        "marker": {"symbol": symbol(i), "size": 8},
        "hoverinfo": "text",
        "text": [
            f"by {label(order)}, {p['n_components']} components: "
            + in_words(one, as_percent=metric == "sdt")
            for p, one in zip(points, found, strict=True)
        ],
    }


def _said(point: Record) -> str:
    return f"{point['n_components']} components, FDT {number(_metrics(point)['fdt']['value'])}"


def _row(point: Record) -> list[str]:
    cells = [in_words(_metrics(point)[m], as_percent=m == "sdt") for m, _ in METRICS]
    return [point["rank_by"], str(point["n_components"]), percent(point["share"]), *cells]
