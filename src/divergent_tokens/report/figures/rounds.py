"""A pruning: FDT and perplexity over its rounds, and who lost how many weights."""

from collections import defaultdict

from divergent_tokens.report.figures.figure import (
    Figure,
    Trace,
    axis,
    colour,
    layout,
    shown,
    symbol,
)
from divergent_tokens.report.numbers import number, percent
from divergent_tokens.report.tables import Record

PANELS = (("fdt", "FDT"), ("sdt", "SDT"), ("ppl", "PPL"))
WHEN = (("before", "cut", "dot"), ("after", "trained", "solid"))


def rounds(record: Record, name: str) -> Figure:
    """FDT, SDT and, where a text was given, PPL after each cut and after each training."""
    panels = [p for p in PANELS if any(one["after"][p[0]] is not None for one in record["rounds"])]
    n = len(panels)
    data: list[Trace] = []
    x = axis("zeros", tickformat=".0%")
    if len(record["rounds"]) == 1:
        x["range"] = [0, 1]  # of a single point plotly makes an axis that begins below 0
    built = layout(x, {}, height=140 + 150 * n)
    for i, (metric, title) in enumerate(panels):
        yaxis = "y" if i == 0 else f"y{i + 1}"
        data += [_line(record, metric, title, *when, yaxis, i) for when in WHEN]
        top = 1 - i / n
        more = {"domain": [top - 0.86 / n, top], "nticks": 4}
        if metric == "sdt":
            more["tickformat"] = ".0%"
        kind = {"type": "log"} if metric == "ppl" else {"rangemode": "tozero"}
        built[yaxis.replace("y", "yaxis")] = axis(title, **more, **kind)
    built["xaxis"]["anchor"] = "y" if n == 1 else f"y{n}"
    last = record["rounds"][-1]
    return Figure(
        name=name,
        title="Round by round",
        caption=(
            "Each round cuts and then trains what is left. Dotted: right after the cut; solid: "
            "after the training, the same where there is none."
        ),
        alt=(
            f"after {len(record['rounds'])} rounds {percent(last['sparsity'])} zeros, FDT "
            f"{number(last['after']['fdt'])}, SDT {percent(last['after']['sdt'])}, PPL "
            f"{number(last['after']['ppl'])}"
        ),
        data=data,
        layout=built,
        columns=("round", "zeros", *(f"{t}, {w}" for _, t in panels for _, w, _ in WHEN)),
        rows=[
            [
                str(one["round"]),
                percent(one["sparsity"]),
                *(
                    (percent if m == "sdt" else number)(one[key][m])
                    for m, _ in panels
                    for key, _, _ in WHEN
                ),
            ]
            for one in record["rounds"]
        ],
    )


def _line(
    record: Record, metric: str, title: str, key: str, when: str, dash: str, yaxis: str, i: int
) -> Trace:
    form = percent if metric == "sdt" else number
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "name": when,
        "legendgroup": when,
        "showlegend": i == 0,
        "x": [one["sparsity"] for one in record["rounds"]],
        "y": [one[key][metric] for one in record["rounds"]],
        "yaxis": yaxis,
        "line": {"color": colour(0 if key == "after" else 1), "dash": dash, "width": 2.2},
        "marker": {"symbol": symbol(0 if key == "after" else 1), "size": 8},
        "hoverinfo": "text",
        "text": [
            f"round {one['round']}, {percent(one['sparsity'])} zeros, {when}: {title} "
            f"{form(one[key][metric])}"
            for one in record["rounds"]
        ],
    }


def allocation(record: Record, name: str) -> Figure:
    """The share of zeros of every matrix, by kind."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for component in record["components"]:
        groups[component["kind"]].append(component)
    data = [
        {
            "type": "box",
            "name": shown(kind),
            "x": [member["n_zero"] / member["n_parameters"] for member in members],
            "text": [
                f"{shown(m['name'])}: {percent(m['n_zero'] / m['n_parameters'])} zeros"
                for m in members
            ],
            "orientation": "h",
            "boxpoints": "all",
            "pointpos": 0,
            "jitter": 0.4,
            "hoverinfo": "text",
            "hoveron": "points",
            "marker": {"color": colour(i), "size": 5, "opacity": 0.8},
            "line": {"width": 1.2},
        }
        for i, (kind, members) in enumerate(groups.items())
    ]
    shares = {
        kind: sum(m["n_zero"] for m in members) / sum(m["n_parameters"] for m in members)
        for kind, members in groups.items()
    }
    return Figure(
        name=name,
        title="Who lost how many weights",
        caption="Each point is a weight matrix; kinds are rows. All of them together: "
        f"{percent(record['rounds'][-1]['sparsity'])} zeros.",
        alt="; ".join(f"{kind}: {percent(share)} zeros" for kind, share in shares.items()),
        data=data,
        layout=layout(
            axis("zeros", range=[-0.02, 1.02], tickformat=".0%"),
            axis("", autorange="reversed", type="category"),
            height=130 + 50 * len(groups),
            showlegend=False,
        ),
        columns=("kind", "matrices", "zeros", "least", "most"),
        rows=[_kind(kind, members, shares[kind]) for kind, members in groups.items()],
    )


def _kind(kind: str, members: list[Record], share: float) -> list[str]:
    own = [m["n_zero"] / m["n_parameters"] for m in members]
    return [kind, str(len(members)), percent(share), percent(min(own)), percent(max(own))]
