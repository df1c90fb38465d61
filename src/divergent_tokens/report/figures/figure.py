"""A figure as plotly's JSON, with all that stands around it for who cannot see it."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from divergent_tokens.report.tables import harmless

Trace = dict[str, Any]

COLOURS = (
    "#3b82c4",
    "#e08214",
    "#1a9e77",
    "#c84f86",
    "#8a6fd1",
    "#8f8b1a",
    "#d1493f",
    "#2aa3b8",
    "#a0713f",
    "#6f7f3a",
)
"""Told apart by colour-blind people in this order, and seen on white as on near black."""
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "triangle-down", "cross")
FLOOR = "#8a8f98"
"""Of what the base does to itself."""
HARM = [[0.0, "#f1eef6"], [0.25, "#f2c9a1"], [0.5, "#e5883d"], [0.75, "#b5483a"], [1.0, "#5b1e4f"]]
"""From little to much; ever darker, so that it needs no colour."""
SPARSE = [[0.0, "#eef3f8"], [0.5, "#5c9bc9"], [1.0, "#123a63"]]
LONGEST_LABEL = 36


@dataclass(frozen=True)
class View:
    """One of several ways to see a figure: which traces, and what is different of the layout."""

    label: str
    traces: tuple[int, ...]
    layout: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figure:
    """What is drawn, and the same in words and in a table."""

    name: str
    """Of its file and its place on the page: letters, digits and dashes."""
    title: str
    caption: str
    """How to read it."""
    alt: str
    """What it shows, in a sentence with numbers."""
    data: Sequence[Trace]
    layout: Mapping[str, Any]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The table; all cells are text."""
    views: Sequence[View] = ()

    def plot(self) -> dict[str, Any]:
        """What the page's script draws."""
        first = self.views[0].traces if self.views else range(len(self.data))
        data = [
            {**trace, "visible": trace.get("visible", True) if i in first else False}
            for i, trace in enumerate(self.data)
        ]
        return {
            "name": self.name,
            "data": data,
            "layout": self.layout,
            "views": [
                {"label": view.label, "traces": list(view.traces), "layout": dict(view.layout)}
                for view in self.views
            ],
        }


def shown(text: object) -> str:
    """Text as plotly draws it as it is: on one line, no tag, no entity, no template."""
    return html.escape(harmless(str(text)), quote=False).replace("%{", "%&#123;")


def label(text: str) -> str:
    """The same, shortened for a legend or an axis."""
    if len(text) > LONGEST_LABEL:
        text = f"{text[: LONGEST_LABEL // 2 - 1]}…{text[-LONGEST_LABEL // 2 :]}"
    return shown(text)


def colour(i: int) -> str:
    """Of the i-th of several things; after ten they begin again, with another dash."""
    return COLOURS[i % len(COLOURS)]


def dash(i: int) -> str:
    """Of the i-th line: neighbours differ, so that no colour is needed."""
    return DASHES[(i + i // len(COLOURS)) % len(DASHES)]


def symbol(i: int) -> str:
    """Of the i-th kind of points."""
    return SYMBOLS[i % len(SYMBOLS)]


def faint(colour: str, share: float) -> str:
    """The colour, so opaque."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{share:g})"


def axis(title: str, **more: Any) -> dict[str, Any]:
    """An axis with its title."""
    return {"title": {"text": title}, "automargin": True, **more}


def layout(x: Mapping[str, Any], y: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """The layout that figures of one pair of axes share; the page adds the theme's colours."""
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    return {
        "xaxis": dict(x),
        "yaxis": dict(y),
        "height": 420,
        "margin": {"l": 56, "r": 16, "t": 24, "b": 48},
        "legend": legend,
        "hovermode": "closest",
        **more,
    }


def error(estimates: Sequence[Mapping[str, Any]], scale: float = 1.0) -> dict[str, Any]:
    """Bars of ESTIMATEs; nothing where a bound is not known."""

    def to(one: Mapping[str, Any], bound: str) -> float:
        if one[bound] is None or one["value"] is None:
            return 0.0
        return float(abs(one[bound] - one["value"]) * scale)

    return {
        "type": "data",
        "symmetric": False,
        "array": [to(one, "high") for one in estimates],
        "arrayminus": [to(one, "low") for one in estimates],
        "thickness": 1.2,
        "width": 3,
    }
