"""Where candidates drift: metrics by domain and by language."""

from divergent_tokens.report.figures.figure import (
    Figure,
    Trace,
    View,
    axis,
    colour,
    error,
    label,
    layout,
    shown,
    symbol,
)
from divergent_tokens.report.numbers import estimate, in_words, percent
from divergent_tokens.report.tables import Record
from divergent_tokens.report.text import ordered

KINDS = (("by_domain", "domain"), ("by_language", "language"))
METRICS = (("sdt", "SDT"), ("fdt", "FDT"))


def groups(record: Record, name: str) -> Figure | None:
    """SDT and FDT of every candidate in every group; None where there are no two groups."""
    kinds = [kind for kind in KINDS if len(record["noise_floor"][kind[0]]) > 1]
    if not kinds:
        return None
    data: list[Trace] = []
    views, rows = [], []
    candidates = ordered(record)
    for key, what in kinds:
        members = list(record["noise_floor"][key])
        for metric, title in METRICS:
            first = len(data)
            data += [_points(c, i, len(candidates), key, metric) for i, c in enumerate(candidates)]
            x = axis(
                "share of divergent tokens" if metric == "sdt" else "tokens until they part",
                rangemode="tozero",
                tickformat=".1~%" if metric == "sdt" else "",
            )
            y = _axis(record, key, members)
            height = 120 + len(members) * max(24, 11 * len(candidates))
            part = {"xaxis": x, "yaxis": y, "height": height}
            views.append(View(f"{title} by {what}", tuple(range(first, len(data))), part))
        for member in members:
            cells = [_cell(c["metrics"][key][member]) for c in candidates]
            n = record["noise_floor"][key][member]["fdt"]["n_prompts"]
            rows.append([member, str(n), *cells])
    first_view = views[0].layout
    return Figure(
        name=name,
        title="By domain and language",
        caption=(
            "Bars are intervals over a group's prompts, and wide where there are few. Beside each "
            "group stands how many prompts it has."
        ),
        alt="; ".join(_worst(c) for c in candidates),
        data=data,
        layout=layout(first_view["xaxis"], first_view["yaxis"], height=first_view["height"]),
        columns=("", "prompts", *(f"{c['name']}: SDT, FDT" for c in candidates)),
        rows=rows,
        views=views if len(views) > 1 else (),
    )


def _axis(record: Record, key: str, members: list[str]) -> Record:
    counts = [record["noise_floor"][key][member]["fdt"]["n_prompts"] for member in members]
    return axis(
        "",
        tickvals=list(range(len(members))),
        ticktext=[f"{label(m)} ({n})" for m, n in zip(members, counts, strict=True)],
        range=[len(members) - 0.4, -0.6],
        zeroline=False,
    )


def _points(candidate: Record, i: int, n: int, key: str, metric: str) -> Trace:
    found = {group: metrics[metric] for group, metrics in candidate["metrics"][key].items()}
    shift = (i - (n - 1) / 2) * 0.7 / max(n, 3)
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(candidate["name"]),
        "x": [one["value"] for one in found.values()],
        "y": [j + shift for j in range(len(found))],
        "error_x": error(list(found.values())),
        "marker": {"color": colour(i), "symbol": symbol(i), "size": 8},
        "hoverinfo": "text",
        "text": [
            f"{label(candidate['name'])}, {shown(group)}: "
            + in_words(one, as_percent=metric == "sdt")
            for group, one in found.items()
        ],
    }


def _cell(metrics: Record) -> str:
    return f"{percent(metrics['sdt']['value'])}, {estimate(metrics['fdt'])[0]}"


def _worst(candidate: Record) -> str:
    kind = next(kind for kind, _ in KINDS if len(candidate["metrics"][kind]) > 1)
    found = {g: m["sdt"]["value"] for g, m in candidate["metrics"][kind].items()}
    worst, least = max(found, key=found.__getitem__), min(found, key=found.__getitem__)
    return (
        f"{candidate['name']} differs most in {worst} (SDT {percent(found[worst])}) and least in "
        f"{least} ({percent(found[least])})"
    )
