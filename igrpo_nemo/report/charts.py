"""Line and stacked-bar charts as inline SVG: no plotting library, no fonts, no external requests.

Colours are names of CSS custom properties (`draft` -> `var(--draft)`), so that one SVG serves light
and dark pages. Labels may come from data (folder names, reward reasons): all text is escaped here.
A chart carries its points in `data-chart`, which the page's script reads for the value readout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 12.0, 26.0, 40.0
PLOT_BOX = [LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM]
MAX_POINTS = 240
MAX_BARS = 48


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: equally long x and y; `error` are half-widths of error bars, `low`/`high` a band.

    `raw` is drawn thin behind the curve: the points that `y` is a running mean of.
    """

    label: str
    color: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    dashed: bool = False
    markers: bool = False
    error: tuple[float, ...] = ()
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    raw: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """The vertical axis: its label with the unit, and how values are written.

    `percent` writes fractions as percentages; `zero` draws a line at 0 and always shows it.
    """

    label: str
    percent: bool = False
    zero: bool = False


@dataclass(frozen=True, slots=True)
class Layer:
    """One part of a stack: a value per bar."""

    label: str
    color: str
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Scale:
    """Data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(
    lines: Sequence[Line],
    axis: Axis,
    title: str,
    *,
    x_label: str = "training step",
    x_name: str = "step",
    x_log: bool = False,
) -> Markup:
    """An SVG of the lines over a common x axis. `title` is its accessible name.

    `x_log` spaces positive x by their logarithm, with ticks at powers of two; `x_name` stands
    before x in the readout. Raises `ValueError` when there is nothing to draw: the caller says in
    words what is missing.
    """
    lines = [thin_out(line) for line in lines if line.x]
    if not lines:
        raise ValueError(f"nothing to draw in {title!r}")
    x = _x_scale([value for line in lines for value in line.x], x_log)
    y = _y_scale(lines, axis)
    body = [_grid(x, y, axis, x_label)]
    body += [_band(line, x, y) for line in lines]
    body += [_curve(line, x, y) for line in lines]
    series = [(line.label, line.color, line.x, line.y) for line in lines]
    points = {**_readout(x, axis, series), "log": x_log, "name": x_name}
    return _svg(title, "".join(body), HEIGHT, points)


def stacked_chart(
    layers: Sequence[Layer],
    axis: Axis,
    *,
    edges: Sequence[float],
    title: str,
    x_label: str = "training step",
) -> Markup:
    """Stacked bars: bar i spans `edges[i]` to `edges[i + 1]`; layers from the bottom up."""
    totals = [sum(bar) for bar in zip(*(layer.values for layer in layers), strict=True)]
    x = Scale(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    top = 1.0 if axis.percent and max(totals) <= 1.0 + 1e-9 else max(totals) or 1.0
    y = Scale(0.0, _ticks(0.0, top)[-1] if not axis.percent else top, HEIGHT - BOTTOM, TOP)
    body = [_grid(x, y, axis, x_label)]
    base = [0.0] * len(totals)
    for layer in layers:
        bars = []
        for i, value in enumerate(layer.values):
            if value <= 0:
                continue
            left, right = x(edges[i]), x(edges[i + 1])
            gap = min(1.0, (right - left) * 0.1)
            upper, lower = y(base[i] + value), y(base[i])
            bars.append(f"M{left:.1f} {lower:.1f}V{upper:.1f}H{right - gap:.1f}V{lower:.1f}Z")
            base[i] += value
        body.append(f'<path class="fill" style="--c:var(--{layer.color})" d="{"".join(bars)}"/>')
    centers = [(a + b) / 2 for a, b in zip(edges, edges[1:], strict=False)]
    series = [(layer.label, layer.color, centers, layer.values) for layer in layers]
    return _svg(title, "".join(body), HEIGHT, _readout(x, axis, series))


def bar_rows(rows: Sequence[tuple[str, Sequence[Layer]]], axis: Axis, *, title: str) -> Markup:
    """Horizontal stacked bars, one a row: (row label, layers with one value each)."""
    height = 34.0 * len(rows) + BOTTOM + 4
    longest = (
        max((sum(layer.values[0] for layer in layers) for _, layers in rows), default=0.0) or 1.0
    )
    high = 1.0 if axis.percent and longest <= 1.0 + 1e-9 else _ticks(0.0, longest)[-1]
    x = Scale(0.0, high, LEFT, WIDTH - RIGHT - 10)
    body = []
    for tick in _ticks(0.0, high):
        if tick <= high:
            body.append(_vertical(x(tick), 0.0, height - BOTTOM, format_value(tick, axis.percent)))
    for i, (label, layers) in enumerate(rows):
        top, left = 34.0 * i, x(0.0)
        body.append(f'<text class="tick" x="{LEFT}" y="{top + 11:.0f}">{escape(label)}</text>')
        for layer in layers:
            width = x(layer.values[0]) - x(0.0)
            body.append(
                f'<rect class="fill" style="--c:var(--{layer.color})" x="{left:.1f}" '
                f'y="{top + 15:.0f}" width="{max(width, 0):.1f}" height="14">'
                f"<title>{escape(layer.label)}: "
                f"{format_value(layer.values[0], axis.percent)}</title></rect>"
            )
            left += width
    body.append(
        f'<text class="xlabel" x="{WIDTH - RIGHT}" y="{height - 6:.0f}">{escape(axis.label)}</text>'
    )
    return _svg(title, "".join(body), height, None)


def running_mean(values: Sequence[float], window: int) -> tuple[float, ...]:
    """Mean of each value and the up to `window - 1` before it."""
    out, total = [], 0.0
    for i, value in enumerate(values):
        total += value
        if i >= window:
            total -= values[i - window]
        out.append(total / min(i + 1, window))
    return tuple(out)


def smoothing_window(count: int) -> int:
    """Points in the running mean of `count` points: 1 (none) below 40, then count / 20."""
    return 1 if count < 40 else max(2, count // 20)


def thin_out(line: Line, limit: int = MAX_POINTS) -> Line:
    """At most `limit` points: means over neighbours, so that no spike moves in time."""
    size = math.ceil(len(line.x) / limit)
    if size <= 1:
        return line

    def means(values: tuple[float, ...]) -> tuple[float, ...]:
        chunks = [values[i : i + size] for i in range(0, len(values), size)]
        return tuple(sum(chunk) / len(chunk) for chunk in chunks)

    series = ("x", "y", "error", "low", "high", "raw")
    return replace(line, **{name: means(getattr(line, name)) for name in series})


def format_value(value: float, percent: bool = False) -> str:
    """A number for people: three digits, `%` for fractions, k and M, powers of ten when tiny."""
    if percent:
        return f"{_short(100.0 * value)} %"
    size = abs(value)
    if size >= 1e9 or (0 < size < 1e-3):
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    if size >= 1e6:
        return f"{_short(value / 1e6)}M"
    if size >= 1e4:
        return f"{_short(value / 1e3)}k"
    return _short(value)


def _short(value: float) -> str:
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "0" if text in ("-0", "0") else text


def _x_scale(values: Sequence[float], log: bool = False) -> Scale:
    low, high = min(values), max(values)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
    return Scale(low, high, LEFT, WIDTH - RIGHT, log)


def _y_scale(lines: Sequence[Line], axis: Axis) -> Scale:
    values = [v for line in lines for v in (*line.y, *line.raw, *line.low, *line.high)]
    values += [
        y + s * e
        for line in lines
        for y, e in zip(line.y, line.error, strict=False)
        for s in (-1, 1)
    ]
    low, high = min(values), max(values)
    if axis.zero or low >= 0:
        # Rates and rewards start at 0, so that the height of a change is not exaggerated.
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12:
        high = low + (abs(low) or (0.1 if axis.percent else 1.0))
    ticks = _ticks(low, high)
    if axis.percent and high <= 1.0:
        return Scale(min(low, ticks[0]), min(1.0, ticks[-1]), HEIGHT - BOTTOM, TOP)
    return Scale(min(low, ticks[0]), max(high, ticks[-1]), HEIGHT - BOTTOM, TOP)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _powers_of_two(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return [2.0**power for power in range(max(first, 0), last + 1)]


def _grid(x: Scale, y: Scale, axis: Axis, x_label: str) -> str:
    parts = [f'<text class="ylabel" x="0" y="12">{escape(axis.label)}</text>']
    for tick in _ticks(y.low, y.high):
        if not y.low - 1e-12 <= tick <= y.high + 1e-12:
            continue
        at = y(tick)
        line_class = "zero" if axis.zero and tick == 0 else "grid"
        parts.append(
            f'<path class="{line_class}" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>'
            f'<text class="tick end" x="{LEFT - 6}" y="{at + 4:.1f}">'
            f"{format_value(tick, axis.percent)}</text>"
        )
    bottom = HEIGHT - BOTTOM
    for tick in _powers_of_two(x.low, x.high) if x.log else _ticks(x.low, x.high):
        if x.low <= tick <= x.high and tick == int(tick):
            parts.append(_vertical(x(tick), bottom, bottom + 4, format_value(tick)))
    parts.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    parts.append(
        f'<text class="xlabel" x="{WIDTH - RIGHT}" y="{HEIGHT - 5}">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _vertical(at: float, top: float, bottom: float, label: str) -> str:
    return (
        f'<path class="grid" d="M{at:.1f} {top}V{bottom}"/>'
        f'<text class="tick mid" x="{at:.1f}" y="{bottom + 14:.0f}">{label}</text>'
    )


def _band(line: Line, x: Scale, y: Scale) -> str:
    if not line.low:
        return ""
    there = [f"{x(a):.1f} {y(b):.1f}" for a, b in zip(line.x, line.high, strict=True)]
    back = [f"{x(a):.1f} {y(b):.1f}" for a, b in zip(line.x, line.low, strict=True)]
    return (
        f'<path class="band" style="--c:var(--{line.color})" d="M{"L".join(there + back[::-1])}Z"/>'
    )


def _curve(line: Line, x: Scale, y: Scale) -> str:
    style = f'style="--c:var(--{line.color})"'
    parts = []
    if line.raw:
        parts.append(f'<path class="raw" {style} d="{_path(line.x, line.raw, x, y)}"/>')
    dash = " dashed" if line.dashed else ""
    parts.append(f'<path class="line{dash}" {style} d="{_path(line.x, line.y, x, y)}"/>')
    for a, b, e in zip(line.x, line.y, line.error, strict=False):
        at, up, down = x(a), y(b + e), y(b - e)
        parts.append(
            f'<path class="error" {style} d="M{at:.1f} {up:.1f}V{down:.1f}M{at - 3:.1f} {up:.1f}h6'
            f'M{at - 3:.1f} {down:.1f}h6"/>'
        )
    if line.markers or len(line.x) == 1:
        dots = (
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3"/>'
            for a, b in zip(line.x, line.y, strict=True)
        )
        parts.append(f'<g class="dots" {style}>{"".join(dots)}</g>')
    return "".join(parts)


def _path(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> str:
    return "M" + "L".join(f"{x(a):.1f} {y(b):.1f}" for a, b in zip(xs, ys, strict=True))


def _readout(
    x: Scale, axis: Axis, series: Sequence[tuple[str, str, Sequence[float], Sequence[float]]]
) -> dict[str, Any]:
    """What the page's script needs to show the values under the pointer."""

    def rounded(values: Sequence[float]) -> list[float]:
        return [float(f"{value:.5g}") for value in values]

    return {
        "x": [x.low, x.high],
        "box": PLOT_BOX,
        "percent": axis.percent,
        "lines": [
            {"label": label, "color": color, "x": rounded(xs), "y": rounded(ys)}
            for label, color, xs, ys in series
        ],
    }


def _svg(title: str, body: str, height: float, points: object) -> Markup:
    data = f' data-chart="{escape(json.dumps(points))}"' if points else ""
    return Markup(
        f'<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(title.strip())}"{data}>{body}</svg>'
    )
