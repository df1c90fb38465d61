"""The model as a map: layers by components, coloured by harm, by chosen scheme, by zeros."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from divergent_tokens.report.figures.figure import (
    COLOURS,
    HARM,
    SPARSE,
    Figure,
    Trace,
    View,
    axis,
    label,
    layout,
    shown,
)
from divergent_tokens.report.numbers import MISSING, number, percent
from divergent_tokens.report.tables import Record

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")
BASE_COLOUR = "#c9ced6"
Values = Mapping[str, tuple[float | None, str]]
"""Component name -> its value, and what is said of it."""


def model_map(
    name: str,
    *,
    sweep: Record | None = None,
    plans: Mapping[str, Record] | None = None,
    prunings: Mapping[str, Record] | None = None,
) -> Figure | None:
    """All that is known of single components, a view for each; None where nothing is.

    A sweep has a view for every scheme, a plan one of the schemes chosen, a pruning one of zeros.
    """
    data: list[Trace] = []
    views: list[View] = []
    told: dict[str, dict[str, str]] = {}
    for title, values, style in _layers(sweep, plans or {}, prunings or {}):
        data.append(_heat(values, style))
        views.append(View(title, (len(data) - 1,), _size(values)))
        for component, (_, text) in values.items():
            told.setdefault(component, {})[title] = text
    if not data:
        return None
    columns = ("component", *(view.label for view in views))
    rows = [
        [component, *(texts.get(title, MISSING) for title in columns[1:])]
        for component, texts in told.items()
    ]
    return Figure(
        name=name,
        title="Map of the model",
        caption=(
            "Each cell is one weight matrix: its layer from top to bottom, its place within the "
            "layer from left to right. Harm is the KL in nats per token that one matrix on its own "
            "costs, on a logarithmic scale."
        ),
        alt=_alt(sweep, plans or {}, prunings or {}),
        data=data,
        layout=layout(
            axis("", type="category", side="top", tickangle=-40, showgrid=False),
            axis("layer", autorange="reversed", type="category", showgrid=False),
            **_size(_first(sweep, plans or {}, prunings or {})),
        ),
        columns=columns,
        rows=rows,
        views=views if len(views) > 1 else (),
    )


def place(component: str) -> tuple[str, str]:
    """Its layer, and its name within the layer; components outside of layers have the layer –.

    >>> place("model.layers.11.mlp.experts.3.up_proj")
    ('11', 'mlp.experts.3.up_proj')
    """
    found = _LAYER.search(component)
    if found is None:
        return MISSING, component
    return found[1], component[found.end() :]


# --- what there is to see ---


def _layers(
    sweep: Record | None, plans: Mapping[str, Record], prunings: Mapping[str, Record]
) -> Iterator[tuple[str, Values, Trace]]:
    """Each view's label, its values, and how they are coloured."""
    for scheme in sweep["schemes"] if sweep else ():
        yield f"harm under {scheme}", _harm(sweep or {}, scheme), _harm_style()
    for file, plan in plans.items():
        # Components that a plan leaves as they are, as far as another record names them.
        names = [c["name"] for c in sweep["components"]] if sweep else list(plan["components"])
        schemes = sorted(set(plan["components"].values()))
        yield f"schemes of {file}", _chosen(plan, names, schemes), _scheme_style(schemes)
    for file, pruning in prunings.items():
        yield f"zeros of {file}", _zeros(pruning), _zero_style()


def _first(
    sweep: Record | None, plans: Mapping[str, Record], prunings: Mapping[str, Record]
) -> Values:
    return next(_layers(sweep, plans, prunings))[1]


def _harm(sweep: Record, scheme: str) -> Values:
    found = {}
    for component in sweep["components"]:
        option = component["options"].get(scheme)
        if option is None:
            continue
        kl = option["kl"]
        error = "" if option["kl_se"] is None else f" ± {number(option['kl_se'], 2)}"
        mark = "≈ " if option["below_rounding"] else ""
        found[component["name"]] = (
            math.log10(kl) if kl > 0 else None,
            f"{mark}{number(kl)}{error}",
        )
    return found


def _chosen(plan: Record, names: Sequence[str], schemes: Sequence[str]) -> Values:
    found: dict[str, tuple[float | None, str]] = {}
    for name in dict.fromkeys([*names, *plan["components"]]):
        scheme = plan["components"].get(name)
        found[name] = (
            0.0 if scheme is None else 1.0 + schemes.index(scheme),
            scheme or "as it was",
        )
    return found


def _zeros(pruning: Record) -> Values:
    shares = {c["name"]: c["n_zero"] / c["n_parameters"] for c in pruning["components"]}
    return {name: (share, percent(share)) for name, share in shares.items()}


# --- how it is drawn ---


def _heat(values: Values, style: Trace) -> Trace:
    layers, columns = dict[str, None](), dict[str, None]()
    at = {}
    for name, (value, text) in values.items():
        layer, column = place(name)
        if (layer, column) in at:  # of another stack of layers
            column = f"{name.partition('.')[0]} {column}"
        layers[layer], columns[column] = None, None
        at[layer, column] = value, f"{shown(name)}<br>{shown(text)}"
    order = sorted(
        layers, key=lambda layer: (not layer.isdigit(), int(layer) if layer.isdigit() else 0)
    )

    def grid(i: int, empty: object) -> list[list[object]]:
        return [
            [at[layer, column][i] if (layer, column) in at else empty for column in columns]
            for layer in order
        ]

    return {
        "type": "heatmap",
        "x": [shown(column) for column in columns],
        "y": order,
        "z": grid(0, None),
        "text": grid(1, ""),
        "hoverinfo": "text",
        "hoverongaps": False,
        "xgap": 2,
        "ygap": 2,
        **style,
    }


def _size(values: Values) -> dict[str, int]:
    return {"height": min(1400, 200 + 16 * len({place(name)[0] for name in values}))}


def _bar(title: str, **more: object) -> dict[str, object]:
    return {"title": {"text": title, "side": "right"}, "thickness": 12, "outlinewidth": 0, **more}


def _harm_style() -> Trace:
    ticks = list(range(-12, 3))
    texts = [f"1e{tick}" for tick in ticks]
    return {"colorscale": HARM, "colorbar": _bar("KL", tickvals=ticks, ticktext=texts)}


def _zero_style() -> Trace:
    bar = _bar("zeros", tickformat=".0%")
    return {"colorscale": SPARSE, "zmin": 0, "zmax": 1, "colorbar": bar}


def _scheme_style(schemes: Sequence[str]) -> Trace:
    """One colour for each scheme, grey for what stays as it is."""
    n = len(schemes) + 1
    colours = [BASE_COLOUR, *(COLOURS[i % len(COLOURS)] for i in range(len(schemes)))]
    scale = [[edge / n, c] for i, c in enumerate(colours) for edge in (i, i + 1)]
    ticks = {"tickvals": list(range(n)), "ticktext": ["as it was", *map(label, schemes)]}
    return {"colorscale": scale, "zmin": -0.5, "zmax": n - 0.5, "colorbar": _bar("", **ticks)}


def _alt(sweep: Record | None, plans: Mapping[str, Record], prunings: Mapping[str, Record]) -> str:
    parts = []
    for scheme in sweep["schemes"] if sweep else ():
        assert sweep is not None
        found = [c for c in sweep["components"] if scheme in c["options"]]
        worst = max(found, key=lambda c: float(c["options"][scheme]["kl"]))
        parts.append(
            f"under {scheme} {worst['name']} harms most, {number(worst['options'][scheme]['kl'])} "
            "nats per token"
        )
    for file, plan in plans.items():
        parts.append(f"{file} changes {len(plan['components'])} components")
    for file, pruning in prunings.items():
        most = max(pruning["components"], key=lambda c: c["n_zero"] / c["n_parameters"])
        share = percent(most["n_zero"] / most["n_parameters"])
        parts.append(f"of {file} the sparsest is {most['name']} with {share} zeros")
    return "; ".join(parts)
