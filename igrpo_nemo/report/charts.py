"""Line charts as inline SVG: no plotting library, no fonts, no external requests.

Colours are names of CSS custom properties (`draft` -> `var(--draft)`), so that one SVG serves light
and dark pages. Labels may come from data (folder names, reward reasons): all text is escaped here.
A chart carries its points in `data-chart`, which the page's script reads for the value readout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from markupsafe import Markup, escape

WIDTH, HEIGHT = 520.0, 290.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, WIDTH - 12, 26.0, HEIGHT - 40
"""The edges of the plot."""
MAX_POINTS = 240


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: equally long x and y, with a band from `low` to `high` where given.

    `raw` is drawn thin behind the curve: the points that `y` is a running mean of.
    """

    label: str
    color: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    dashed: bool = False
    markers: bool = False
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    raw: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Axis:
    """The vertical axis: its label with the unit, and how values are written.

    `percent` writes fractions as percentages; `zero` draws a line at 0 and always shows it. The
    horizontal axis is `x_label`, `x_name` in the readout; `x_log` gives it powers of two.
    """

    label: str
    percent: bool = False
    zero: bool = False
    x_label: str = "training step"
    x_name: str = "step"
    x_log: bool = False


class Scale(NamedTuple):
    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def line_chart(lines: Sequence[Line], axis: Axis, title: str) -> Markup:
    """An SVG of the lines over a common x axis. `title` is its accessible name.

    Raises `ValueError` when there is nothing to draw: the caller says in words what is missing.
    """
    lines = [thin_out(line) for line in lines if line.x]
    if not lines:
        raise ValueError(f"nothing to draw in {title!r}")
    x = _x_scale([value for line in lines for value in line.x], axis.x_log)
    y = _y_scale([v for line in lines for v in (*line.y, *line.raw, *line.low, *line.high)], axis)
    body = [_grid(x, y, axis), *(_band(line, x, y) for line in lines)]
    body += [_curve(line, x, y) for line in lines]
    points = {
        "x": [x.low, x.high],
        "box": [LEFT, RIGHT, TOP, BOTTOM],
        "percent": axis.percent,
        "log": axis.x_log,
        "name": axis.x_name,
        "lines": [
            {"label": each.label, "color": each.color, "x": _digits(each.x), "y": _digits(each.y)}
            for each in lines
        ],
    }
    return Markup(
        f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{escape(title)}" '
        f'data-chart="{escape(json.dumps(points))}">{"".join(body)}</svg>'
    )


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


def thin_out(line: Line) -> Line:
    """At most `MAX_POINTS` points: means over neighbours, so that no spike moves in time."""
    size = math.ceil(len(line.x) / MAX_POINTS)
    if size <= 1:
        return line

    def means(values: tuple[float, ...]) -> tuple[float, ...]:
        chunks = [values[i : i + size] for i in range(0, len(values), size)]
        return tuple(sum(chunk) / len(chunk) for chunk in chunks)

    names = ("x", "y", "low", "high", "raw")
    return replace(line, **{name: means(getattr(line, name)) for name in names})


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
    return f"{_short(value / 1e3)}k" if size >= 1e4 else _short(value)


def _short(value: float) -> str:
    text = f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "0" if text == "-0" else text


def _digits(values: Sequence[float]) -> list[float]:
    return [float(f"{value:.5g}") for value in values]


def _x_scale(values: Sequence[float], log: bool) -> Scale:
    low, high = min(values), max(values)
    if low == high:
        low, high = (low / 2, high * 2) if log else (low - 1, high + 1)
    return Scale(low, high, LEFT, RIGHT, log)


def _y_scale(values: Sequence[float], axis: Axis) -> Scale:
    low, high = min(values), max(values)
    if axis.zero or low >= 0:
        # Rates and rewards start at 0, so that the height of a change is not exaggerated.
        low, high = min(low, 0.0), max(high, 0.0)
    if high - low < 1e-12:
        high = low + (abs(low) or (0.1 if axis.percent else 1.0))
    first, *_, last = _ticks(low, high)
    highest = min(1.0, last) if axis.percent and high <= 1.0 else max(high, last)
    return Scale(min(low, first), highest, BOTTOM, TOP)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _powers_of_two(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
    return [2.0**power for power in range(max(first, 0), last + 1)]


def _grid(x: Scale, y: Scale, axis: Axis) -> str:
    parts = [f'<text class="ylabel" x="0" y="12">{escape(axis.label)}</text>']
    for tick in _ticks(y.low, y.high):
        if y.low - 1e-12 <= tick <= y.high + 1e-12:
            at, kind = y.at(tick), "zero" if axis.zero and tick == 0 else "grid"
            parts.append(
                f'<path class="{kind}" d="M{LEFT} {at:.1f}H{RIGHT}"/>'
                f'<text class="tick end" x="{LEFT - 6}" y="{at + 4:.1f}">'
                f"{format_value(tick, axis.percent)}</text>"
            )
    for tick in _powers_of_two(x.low, x.high) if x.log else _ticks(x.low, x.high):
        if x.low <= tick <= x.high and tick == int(tick):
            at = x.at(tick)
            parts.append(
                f'<path class="grid" d="M{at:.1f} {BOTTOM}V{BOTTOM + 4}"/>'
                f'<text class="tick mid" x="{at:.1f}" y="{BOTTOM + 18}">{format_value(tick)}</text>'
            )
    parts.append(f'<path class="axis" d="M{LEFT} {BOTTOM}H{RIGHT}"/>')
    parts.append(f'<text class="xlabel" x="{RIGHT}" y="{HEIGHT - 5}">{escape(axis.x_label)}</text>')
    return "".join(parts)


def _band(line: Line, x: Scale, y: Scale) -> str:
    if not line.low:
        return ""
    there, back = _points(line.x, line.high, x, y), _points(line.x, line.low, x, y)
    return f'<path class="band" {_color(line)} d="M{"L".join(there + back[::-1])}Z"/>'


def _curve(line: Line, x: Scale, y: Scale) -> str:
    points, color, dash = _points(line.x, line.y, x, y), _color(line), " dashed" * line.dashed
    parts = []
    if line.raw:
        raw = "L".join(_points(line.x, line.raw, x, y))
        parts.append(f'<path class="raw" {color} d="M{raw}"/>')
    parts.append(f'<path class="line{dash}" {color} d="M{"L".join(points)}"/>')
    if line.markers or len(points) == 1:
        dots = ('<circle cx="{}" cy="{}" r="3"/>'.format(*point.split()) for point in points)
        parts.append(f'<g class="dots" {color}>{"".join(dots)}</g>')
    return "".join(parts)


def _points(xs: Sequence[float], ys: Sequence[float], x: Scale, y: Scale) -> list[str]:
    return [f"{x.at(a):.1f} {y.at(b):.1f}" for a, b in zip(xs, ys, strict=True)]


def _color(line: Line) -> str:
    return f'style="--c:var(--{line.color})"'
