"""The flip law: measured SDT and FDT against KL, and the margins that it starts from."""

import math
from collections.abc import Sequence

from divergent_tokens.report.figures.figure import (
    FLOOR,
    Figure,
    Trace,
    View,
    axis,
    colour,
    error,
    faint,
    label,
    layout,
    shown,
    symbol,
)
from divergent_tokens.report.numbers import in_words, number, percent
from divergent_tokens.report.tables import Record
from divergent_tokens.report.text import NEAR_TIE_LOGITS, ordered

METRICS = (("sdt", "SDT", 1), ("fdt", "FDT", 4))
LAST_MARGIN = 10.0
"""Logits; larger margins share the last bin."""
N_BINS = 40


def law(record: Record, noise: Record, name: str) -> Figure | None:
    """Every candidate's SDT and FDT at its KL, on the law's band; None where no KL was measured."""
    candidates = [c for c in ordered(record) if c["metrics"]["kl"]]
    if not candidates:
        return None
    data: list[Trace] = []
    views = []
    # A tenth of a token in all: what a logarithmic axis has for zero.
    n_tokens = sum(row["n_tokens"] for row in candidates[0]["rows"])
    for metric, title, column in METRICS:
        first, least = len(data), 0.1 / n_tokens if metric == "sdt" else 0.0
        data += _band(noise["table"], column, least)
        data += [_point(c, i, metric, least) for i, c in enumerate(candidates)]
        views.append(View(title, tuple(range(first, len(data))), {"yaxis": _y(metric, least)}))
    judged = {one["name"]: one for one in noise["candidates"]}
    rows = [_row(candidate, judged[candidate["name"]]) for candidate in candidates]
    constants = noise["law"]
    return Figure(
        name=name,
        title="Ordinary noise, or more?",
        caption=(
            "The flip law: a token flips when noise on the gap between the base's two best logits "
            "exceeds its margin. From a KL it says what SDT and FDT to expect of noise alone (line "
            f"and band; σ/√KL = {number(constants['sdt']['value'])} for SDT, "
            f"{number(constants['fdt']['value'])} for FDT, "
            f"{_many(constants['sdt']['n_measured'])}). A point off the band is damage of "
            "another kind. At the lower edge no token differs. The law ends at a KL of 0.3."
        ),
        alt="; ".join(f"{row[0]}: {row[-1]}" for row in rows),
        data=data,
        layout=layout(
            axis("KL, nats per token", type="log", exponentformat="power", dtick=1),
            _y("sdt", 0.1 / n_tokens),
        ),
        columns=("", "KL", "SDT", "by the law", "FDT", "by the law", ""),
        rows=rows,
        views=views,
    )


def _many(n: int) -> str:
    if not n:
        return "as other bases have it"
    return f"read off {n} candidate{'' if n == 1 else 's'} here"


def verdict(judged: Record) -> str:
    """Whether a candidate's damage is ordinary noise, in words."""
    if judged["reason"]:
        return "beyond the law's range (KL above 0.3): no judgement"
    found = {name: judged[name] for name in ("sdt", "fdt")}
    odd = [name for name, one in found.items() if one["ordinary"] is False]
    if not odd:
        return "ordinary noise: SDT and FDT are what its KL leads one to expect"
    parts = []
    for name in odd:
        one = found[name]
        more = one["measured"] > one["expected"]["value"]
        worse = more == (name == "sdt")
        parts.append(f"its {name.upper()} is {'worse' if worse else 'better'} than noise of its KL")
    return "not ordinary noise: " + " and ".join(parts)


def _y(metric: str, least: float) -> Record:
    if metric == "sdt":
        span = [math.log10(least), 0.05]
        name = "share of divergent tokens"
        return axis(name, type="log", tickformat=".3~%", dtick=1, range=span)
    return axis("tokens until they part", type="linear", rangemode="tozero", tickformat="")


def _band(table: Sequence[Sequence[float]], column: int, least: float) -> list[Trace]:
    """Nothing is drawn below `least`: a logarithmic axis has no zero."""
    kls = [row[0] for row in table]
    low, high = ([max(row[column + i], least) for row in table] for i in (1, 2))
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [*kls, *reversed(kls)],
            "y": [*high, *reversed(low)],
            "fill": "toself",
            "fillcolor": faint(FLOOR, 0.16),
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
        },
        {
            "type": "scatter",
            "mode": "lines",
            "name": "flip law",
            "x": kls,
            "y": [max(row[column], least) for row in table],
            "line": {"color": FLOOR, "width": 2, "dash": "dash"},
            "hoverinfo": "skip",
        },
    ]


def _point(candidate: Record, i: int, metric: str, least: float) -> Trace:
    metrics = candidate["metrics"]
    value = in_words(metrics[metric], as_percent=metric == "sdt")
    return {
        "type": "scatter",
        "mode": "markers",
        "name": label(candidate["name"]),
        "x": [metrics["kl"]["value"]],
        "y": [max(metrics[metric]["value"], least)],
        "error_x": error([metrics["kl"]]),
        "error_y": error([metrics[metric]]),
        "marker": {"color": colour(i), "symbol": symbol(i), "size": 11},
        "hoverinfo": "text",
        "text": [
            f"{shown(candidate['name'])}: KL {number(metrics['kl']['value'])}, "
            f"{metric.upper()} {value}"
        ],
    }


def _row(candidate: Record, judged: Record) -> list[str]:
    cells = [candidate["name"], number(judged["kl"])]
    for name in ("sdt", "fdt"):
        share = name == "sdt"
        cells.append((percent if share else number)(judged[name]["measured"]))
        cells.append(in_words(judged[name]["expected"], as_percent=share))
    return [*cells, verdict(judged)]


def margins(record: Record, name: str) -> Figure:
    """How sure the base is of its tokens: its margins, near ties first."""
    found = [margin for row in record["prompts"]["margins"] for margin in row]
    width = LAST_MARGIN / N_BINS
    counts = [0] * N_BINS
    for margin in found:
        counts[min(N_BINS - 1, max(0, int(margin / width)))] += 1
    edges = [i * width for i in range(N_BINS)]
    ties = sum(margin < NEAR_TIE_LOGITS for margin in found) / len(found)
    small = sum(margin < 1 for margin in found) / len(found)
    said = (
        f"{percent(ties)} of the base's tokens are near ties (a margin under {NEAR_TIE_LOGITS} "
        f"logits), {percent(small)} have a margin under 1"
    )
    rows = [
        [f"{low:g} to {low + width:g}" if i < N_BINS - 1 else f"{low:g} and more", str(count)]
        for i, (low, count) in enumerate(zip(edges, counts, strict=True))
    ]
    return Figure(
        name=name,
        title="The base's margins",
        caption=(
            "How far the base's own token lies above its second best, in logits. What lies at the "
            f"left flips under the slightest disturbance. {said}."
        ),
        alt=said,
        data=[
            {
                "type": "bar",
                "x": [edge + width / 2 for edge in edges],
                "y": [count / len(found) for count in counts],
                "width": width * 0.92,
                "marker": {"color": [colour(0) for _ in edges]},
                "hoverinfo": "text",
                "textposition": "none",
                "text": [f"margin {row[0]}: {row[1]} tokens" for row in rows],
            }
        ],
        layout=layout(
            axis("margin, logits (10 and more in the last)"),
            axis("share of tokens", tickformat=".0%"),
            height=280,
            showlegend=False,
        ),
        columns=("margin", "tokens"),
        rows=rows,
    )
