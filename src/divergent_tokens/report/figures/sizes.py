"""Sensitivity against size: where bytes are cheap to save, and what a plan picks."""

from collections.abc import Mapping

from divergent_tokens.report.figures.figure import (
    Figure,
    Trace,
    axis,
    colour,
    label,
    layout,
    shown,
    symbol,
)
from divergent_tokens.report.numbers import number
from divergent_tokens.report.tables import Record


def sizes(sweep: Record, plans: Mapping[str, Record], name: str) -> Figure:
    """Each component's KL under each scheme against the bytes it has then; rings are picks."""
    data = [_scheme(sweep, scheme, i) for i, scheme in enumerate(sweep["schemes"])]
    picks = {file: _picked(sweep, plan) for file, plan in plans.items()}
    data += [_rings(file, found) for file, found in picks.items()]
    rows = []
    for component in sweep["components"]:
        for scheme, option in component["options"].items():
            by = [
                file
                for file, plan in plans.items()
                if plan["components"].get(component["name"]) == scheme
            ]
            rows.append(
                [
                    component["name"],
                    scheme,
                    f"{option['size_bytes']:,}",
                    number(option["kl"]),
                    ", ".join(by),
                ]
            )
    return Figure(
        name=name,
        title="Sensitivity against size",
        caption=(
            "Every point is a component under a scheme: the bytes that it takes then, and the KL "
            "in nats per token that it costs on its own. Low is cheap, left is small; a ring is a "
            "plan's pick. Both axes are logarithmic."
        ),
        alt="; ".join(
            [
                f"{scheme}: KLs of single components add up to {number(_sum(sweep, scheme))}"
                for scheme in sweep["schemes"]
            ]
            + [f"{file} picks {len(found)} of the points" for file, found in picks.items()]
        ),
        data=data,
        layout=layout(
            axis("bytes under the scheme", type="log", exponentformat="SI", dtick="D2"),
            axis("KL, nats per token", type="log", exponentformat="power", dtick=1),
        ),
        columns=("component", "scheme", "bytes", "KL", "picked by"),
        rows=rows,
    )


def _sum(sweep: Record, scheme: str) -> float:
    options = [component["options"].get(scheme) for component in sweep["components"]]
    return float(sum(option["kl"] for option in options if option is not None))


def _scheme(sweep: Record, scheme: str, i: int) -> Trace:
    found = [c for c in sweep["components"] if c["options"].get(scheme, {"kl": 0})["kl"] > 0]
    options = [component["options"][scheme] for component in found]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(scheme),
        "x": [option["size_bytes"] for option in options],
        "y": [option["kl"] for option in options],
        "marker": {"color": colour(i), "symbol": symbol(i), "size": 7, "opacity": 0.75},
        "hoverinfo": "text",
        "text": [
            f"{shown(c['name'])}<br>{shown(scheme)}: KL {number(o['kl'])}, "
            f"{o['size_bytes']:,} bytes"
            for c, o in zip(found, options, strict=True)
        ],
    }


def _picked(sweep: Record, plan: Record) -> list[tuple[int, float]]:
    """Bytes and KL of the options that the plan takes."""
    found = []
    for component in sweep["components"]:
        option = component["options"].get(plan["components"].get(component["name"]))
        if option is not None and option["kl"] > 0:
            found.append((option["size_bytes"], option["kl"]))
    return found


def _rings(file: str, found: list[tuple[int, float]]) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": f"picked by {label(file)}",
        "x": [size for size, _ in found],
        "y": [kl for _, kl in found],
        "marker": {"color": "#7b8494", "symbol": "circle-open", "size": 13, "line": {"width": 1.6}},
        "hoverinfo": "skip",
    }
