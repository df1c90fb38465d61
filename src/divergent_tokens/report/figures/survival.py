"""How many prompts still agree after t tokens, and how far each came."""

from collections.abc import Iterator, Sequence

from divergent_tokens.report.figures.figure import (
    FLOOR,
    Figure,
    Trace,
    axis,
    colour,
    dash,
    faint,
    label,
    layout,
    shown,
)
from divergent_tokens.report.numbers import in_words, number, percent
from divergent_tokens.report.tables import Record
from divergent_tokens.report.text import ordered

N_BINS = 16


def survival(record: Record, name: str) -> Figure:
    """S(t) of every candidate with its band, and of the two floors."""
    length = max(map(len, record["prompts"]["margins"]))
    traces = [
        _line("noise floor", record["noise_floor"]["survival"], length, FLOOR, "dot"),
        _line("rounding", record["rounding"]["survival"], length, FLOOR, "dash"),
    ]
    traces.insert(0, _band("noise floor", record["noise_floor"]["survival"], length, FLOOR))
    rows = [_row("noise floor", record["noise_floor"]), _row("rounding", record["rounding"])]
    for i, candidate in enumerate(ordered(record)):
        curve = candidate["metrics"]["survival"]
        traces.append(_band(candidate["name"], curve, length, colour(i)))
        traces.append(_line(candidate["name"], curve, length, colour(i), dash(i)))
        rows.append(_row(candidate["name"], candidate["metrics"]))
    level = 100 * record["noise_floor"]["fdt"]["level"]
    return Figure(
        name=name,
        title="How long each candidate agrees with the base",
        caption=(
            "The share of prompts on which a candidate has written nothing else than the base "
            f"on its first t + 1 tokens; bands are {level:g}% intervals over prompts. Grey: the "
            "base against its own text. A line that falls at once belongs to a model that writes "
            "another text at once."
        ),
        alt="; ".join(f"{row[0]}: {row[3]} of prompts never part from the base" for row in rows),
        data=traces,
        layout=layout(
            axis("tokens t", range=[0, length], rangemode="tozero"),
            axis("share of prompts", range=[0, 1.02], tickformat=".0%"),
            hovermode="x",
        ),
        columns=("", "FDT", "median FDT", "never part"),
        rows=rows,
    )


def _row(name: str, metrics: Record) -> list[str]:
    cells = [in_words(metrics[key]) for key in ("fdt", "median_fdt")]
    return [name, *cells, percent(metrics["identical"])]


def _steps(curve: Sequence[Sequence[float]], column: int, length: int) -> tuple[list[float], ...]:
    """The corners of the step function that a column of [t, S, low, high] is."""
    before = [row for row in curve if row[0] < length] or [[0, 1.0, 1.0, 1.0]]
    xs: list[float] = [before[0][0]]
    ys: list[float] = [before[0][column]]
    for row in before[1:]:
        xs += [row[0], row[0]]
        ys += [ys[-1], row[column]]
    return [*xs, length], [*ys, ys[-1]]


def _line(
    name: str, curve: Sequence[Sequence[float]], length: int, colour: str, dash: str
) -> Trace:
    xs, ys = _steps(curve, 1, length)
    return {
        "type": "scatter",
        "mode": "lines",
        "name": label(name),
        "legendgroup": shown(name),
        "x": xs,
        "y": ys,
        "line": {"color": colour, "dash": dash, "width": 2.4},
        "hoverinfo": "text",
        "text": [
            f"{label(name)}: {percent(y)} agree on the first {number(x + 1)} tokens"
            for x, y in zip(xs, ys, strict=True)
        ],
    }


def _band(name: str, curve: Sequence[Sequence[float]], length: int, colour: str) -> Trace:
    xs, low = _steps(curve, 2, length)
    _, high = _steps(curve, 3, length)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [*xs, *reversed(xs)],
        "y": [*high, *reversed(low)],
        "fill": "toself",
        "fillcolor": faint(colour, 0.13),
        "line": {"width": 0},
        "legendgroup": shown(name),
        "showlegend": False,
        "hoverinfo": "skip",
    }


def distributions(record: Record, name: str) -> Figure:
    """For each candidate how many prompts part after how many tokens, and how many never do."""
    length = max(map(len, record["prompts"]["margins"]))
    width = max(1, -(-length // N_BINS))
    edges = list(range(0, length, width))
    names = [
        f"{edge}–{min(edge + width, length) - 1}" if width > 1 else str(edge) for edge in edges
    ]
    traces, rows = [], []
    candidates = ordered(record)
    for i, candidate in enumerate(candidates):
        counts = _counts(candidate["rows"], width, len(edges))
        n = len(candidate["rows"])
        rows.append([candidate["name"], *map(str, counts)])
        traces.append(
            {
                "type": "bar",
                "name": label(candidate["name"]),
                "x": [*names, "never"],
                "y": [count / n for count in counts],
                "marker": {"color": [colour(i)] * len(edges) + [FLOOR]},
                "xaxis": "x",
                "yaxis": "y" if i == 0 else f"y{i + 1}",
                "hoverinfo": "text",
                "textposition": "none",
                "text": [
                    f"{label(candidate['name'])}: {count} of {n} prompts, "
                    + ("which never part" if where == "never" else f"FDT {where}")
                    for where, count in zip([*names, "never"], counts, strict=True)
                ],
            }
        )
    return Figure(
        name=name,
        title="Where they part",
        caption=(
            "The share of prompts by first divergent token (FDT). Grey on the right: prompts on "
            "which the candidate agrees to the end of the completion, however long it is."
        ),
        alt="; ".join(
            f"{row[0]}: {row[1]} of {len(c['rows'])} prompts part within {width} tokens, "
            f"{row[-1]} never"
            for row, c in zip(rows, candidates, strict=True)
        ),
        data=traces,
        layout=_stacked([candidate["name"] for candidate in candidates]),
        columns=("", *names, "never"),
        rows=rows,
    )


def _counts(rows: Sequence[Record], width: int, n_bins: int) -> list[int]:
    counts = [0] * (n_bins + 1)
    for row in rows:
        counts[-1 if row["censored"] else min(row["fdt"] // width, n_bins - 1)] += 1
    return counts


def _stacked(names: Sequence[str]) -> dict[str, object]:
    """One panel below the other, with a common axis."""
    n = len(names)
    built = layout(
        axis("first divergent token", type="category"), {}, height=110 + 105 * n, showlegend=False
    )
    built["annotations"] = list(_titles(names))
    for i in range(n):
        top = 1 - i / n
        built["yaxis" if i == 0 else f"yaxis{i + 1}"] = {
            "domain": [max(0.0, top - 0.74 / n), top - 0.16 / n],
            "tickformat": ".0%",
            "nticks": 3,
            "rangemode": "tozero",
            "automargin": True,
        }
    built["xaxis"]["anchor"] = "y" if n == 1 else f"y{n}"
    return built


def _titles(names: Sequence[str]) -> Iterator[dict[str, object]]:
    for i, name in enumerate(names):
        yield {
            "text": label(name),
            "x": 0,
            "y": 1 - i / len(names),
            "xref": "paper",
            "yref": "paper",
            "xanchor": "left",
            "yanchor": "middle",
            "showarrow": False,
        }
