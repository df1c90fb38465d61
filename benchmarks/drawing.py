"""Small charts as SVG text: points with intervals, joined or not. The same data, the same bytes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 190, 40, 56
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#56b4e9", "#444444", "#e69f00")
"""Told apart by people who see colours otherwise (Okabe and Ito)."""


@dataclass(frozen=True)
class Point:
    """A value, and its interval where it has one."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points under one name."""

    name: str
    points: tuple[Point, ...]
    joined: bool = True


@dataclass(frozen=True)
class Chart:
    """What is drawn; `x_names` name places on an axis that has no numbers."""

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    x_names: tuple[str, ...] = ()


def svg(chart: Chart) -> str:
    """The chart as the text of an SVG file, with a title that a screen reader says."""
    points = [point for series in chart.series for point in series.points]
    xs = [point.x for point in points]
    ys = [y for p in points for y in (p.y, p.low, p.high) if y is not None]
    across = _scale(xs, chart.log_x, LEFT, WIDTH - RIGHT, padded=True)
    up = _scale(ys, chart.log_y, HEIGHT - BOTTOM, TOP, padded=chart.log_y, zero=not chart.log_y)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{escape(chart.title)}</title>",
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        _text(LEFT, 22, chart.title, 'font-size="14" font-weight="bold"'),
        *_axes(chart, xs, ys, across, up),
    ]
    n = len(chart.series)
    for i, series in enumerate(chart.series):
        shift = 5.0 * (i - (n - 1) / 2) if n > 1 and not chart.log_x else 0.0
        colour = COLOURS[i % len(COLOURS)]
        lines += _series(series, colour, across, up, shift)
        at = TOP + 14 + 20 * i
        lines.append(f'<circle cx="{WIDTH - RIGHT + 18}" cy="{at - 4}" r="4" fill="{colour}"/>')
        lines.append(_text(WIDTH - RIGHT + 30, at, series.name))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _series(
    series: Series,
    colour: str,
    across: Callable[[float], float],
    up: Callable[[float], float],
    shift: float,
) -> list[str]:
    lines = []
    places = [(across(p.x) + shift, up(p.y)) for p in series.points]
    if series.joined and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
    for point, (x, y) in zip(series.points, places, strict=True):
        if point.low is not None and point.high is not None:
            lines.append(
                f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{up(point.low):.1f}" '
                f'y2="{up(point.high):.1f}" stroke="{colour}" stroke-width="1.5" opacity="0.6"/>'
            )
        lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
    return lines


def _axes(
    chart: Chart,
    xs: Sequence[float],
    ys: Sequence[float],
    across: Callable[[float], float],
    up: Callable[[float], float],
) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    lines = []
    for value in _ticks(ys, chart.log_y, zero=not chart.log_y):
        y = up(value)
        lines.append(f'<line x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" stroke="#dddddd"/>')
        lines.append(_text(LEFT - 6, y + 4, f"{value:g}", 'text-anchor="end"'))
    named = list(enumerate(chart.x_names)) if chart.x_names else None
    own = sorted(set(xs)) if all(x == int(x) for x in xs) and len(set(xs)) <= 8 else None
    ticks = own or _ticks(xs, chart.log_x)
    for value, name in named or [(value, f"{value:g}") for value in ticks]:
        lines.append(_text(across(value), bottom + 18, name, 'text-anchor="middle"'))
    lines += [
        f'<line x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" stroke="#444444"/>',
        _text((LEFT + right) / 2, HEIGHT - 16, chart.x_label, 'text-anchor="middle"'),
        _text(
            0,
            0,
            chart.y_label,
            f'text-anchor="middle" transform="translate(16 {HEIGHT / 2 - 8:g}) rotate(-90)"',
        ),
    ]
    return lines


def _text(x: float, y: float, text: str, more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{" " + more if more else ""}>{escape(text)}</text>'


def _scale(
    values: Sequence[float],
    log: bool,
    start: float,
    end: float,
    *,
    padded: bool,
    zero: bool = False,
) -> Callable[[float], float]:
    """From a value to a place between `start` and `end`."""
    turned = [math.log10(value) for value in values] if log else list(values)
    low, high = min(turned), max(turned)
    if zero:
        low, high = min(low, 0.0), high * 1.05
    span = (high - low) or 1.0
    if padded:
        low, high = low - 0.06 * span, high + 0.06 * span
    else:
        high = low + span

    def place(value: float) -> float:
        return start + ((math.log10(value) if log else value) - low) / (high - low) * (end - start)

    return place


def _ticks(values: Sequence[float], log: bool, *, zero: bool = False) -> list[float]:
    """Round numbers over the values' range."""
    low, high = min(values), max(values)
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        steps = (1, 2, 5) if high / low < 100 else (1,)
        found = [round(step * 10.0**e, 10) for e in decades for step in steps]
        return [value for value in found if low * 0.95 <= value <= high * 1.05]
    low = min(low, 0.0) if zero else low
    step = 10.0 ** math.floor(math.log10((high - low) / 2 or 1.0))
    while (high - low) / step > 7:
        step *= 2 if (high - low) / (2 * step) <= 7 else 5
    first = math.ceil(low / step)
    return [round((first + i) * step, 10) for i in range(int((high - first * step) / step) + 1)]
