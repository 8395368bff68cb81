"""Line charts as inline SVG, without scripts: colours come from the page's style sheet, numbers from tooltips."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 420, 236
LEFT, RIGHT, TOP, BOTTOM = 48, 10, 12, 26
NUM_COLOURS = 6
"""Colours of the style sheet, `--c0` to `--c5`; a seventh curve starts over with a dashed line."""
DASHES = ("", "6 4", "2 3", "9 3 2 3")
MOST_POINTS = 400
"""Points a curve is drawn with: about one a pixel, so that a long run still makes a small page."""
MOST_TOOLTIPS = 48
MOST_DOTS = 24
"""Points up to which each is marked, as the few evaluations of a run are."""

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: its name, finite (x, y) points in order of x, its colour; its running mean over it or in its place."""

    name: str
    points: Points
    colour: int = 0
    mean: Literal["no", "over", "only"] = "no"

    def drawn(self) -> Points:
        """The points that the chart shows as the curve's values."""
        return running_mean(self.points) if self.mean == "only" else self.points


def line_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_label: str = "step",
    x_end: float = 0.0,
    level: tuple[str, float] | None = None,
) -> str:
    """A figure with title, axes with round numbers, and one line a curve; empty when no curve has a point.

    The x axis goes from 0 to the last point or `x_end`, so that charts of one run can be compared by eye. `level` is a
    named dashed line across the chart, such as the loss of the base.
    """
    curves = [curve for curve in curves if curve.points]
    if not curves:
        return ""
    values = [y for curve in curves for _, y in curve.drawn()] + ([level[1]] if level else [])
    frame = Frame(max(x_end, 1.0, *(curve.points[-1][0] for curve in curves)), round_ticks(min(values), max(values)))
    parts = [axes(frame), *(_line(frame, curve) for curve in curves)]
    if level:
        parts.append(_level(frame, *level))
    parts.extend(_tooltips(frame, curve, x_label) for curve in curves)
    label = escape(f"{title} by {x_label}")
    return (
        f"<figure><figcaption>{escape(title)} <span>by {escape(x_label)}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def legend(names: Sequence[str]) -> str:
    """The key to the curves, in the order of their colours; empty for a single curve."""
    if len(names) < 2:
        return ""
    keys = (
        f'<li><svg viewBox="0 0 24 8" width="24" height="8"><path d="M0 4H24" {_stroke(index)}/></svg>'
        f"{escape(name)}</li>"
        for index, name in enumerate(names)
    )
    return f'<ul class="legend">{"".join(keys)}</ul>'


def round_ticks(low: float, high: float, *, count: int = 6, least: float = 0.0) -> list[float]:
    """About `count` round numbers (1, 2, 2.5 or 5 times a power of ten apart, `least` or more) around low to high."""
    if high <= low:
        margin = abs(low) * 0.5 or 1.0
        low, high = low - margin, low + margin
    raw = max((high - low) / (count - 1), least)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def short_number(value: float) -> str:
    """A number of at most about six characters: 12k, 0.25, 2e-4."""
    size = abs(value)
    if size < 1e-12:
        return "0"
    for unit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= unit:
            return f"{value / (1e3 if suffix == 'k' else unit):.4g}{suffix}"
    return _scientific(value) if size < 1e-3 else f"{value:.4g}"


def running_mean(points: Points, share: float = 0.02) -> list[tuple[float, float]]:
    """The exponential mean over about `share` of the points, without a pull towards the start."""
    keep = 1.0 - 1.0 / max(1.0, len(points) * share)
    total = weight = 0.0
    smooth = []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1.0
        smooth.append((x, total / weight))
    return smooth


def thin(points: Points, most: int = MOST_POINTS) -> Points:
    """At most about `most` of the points, with the lowest and the highest of every stretch among them."""
    if len(points) <= most:
        return points
    size = math.ceil(2 * len(points) / most)
    kept: list[tuple[float, float]] = [points[0]]
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        low, high = min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])
        kept.extend(sorted({low, high}))
    kept.append(points[-1])
    return sorted(set(kept))


class Frame:
    """Where numbers stand on a drawing: x from 0 to `x_end`, y from the first tick to the last."""

    def __init__(self, x_end: float, y_ticks: Sequence[float], width: int = WIDTH, height: int = HEIGHT):
        self.x_end, self.y_ticks, self.width, self.height = x_end, y_ticks, width, height

    def x(self, value: float) -> float:
        return LEFT + value / self.x_end * (self.width - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return self.height - BOTTOM - (value - low) / (high - low) * (self.height - TOP - BOTTOM)

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in points)


def _stroke(colour: int) -> str:
    dash = DASHES[colour // NUM_COLOURS % len(DASHES)]
    return f'class="k{colour % NUM_COLOURS}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def axes(frame: Frame) -> str:
    """Lines across at the ticks of y, and the numbers of both axes, as SVG."""
    right, parts = frame.width - RIGHT, []
    for tick in frame.y_ticks:
        y = frame.y(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{right}"/>')
        # numbers on one axis are written alike: 2e-3 beside 5e-4, not 0.002
        label = _scientific(tick) if frame.y_ticks[-1] < 0.01 else short_number(tick)
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for tick in round_ticks(0.0, frame.x_end, least=1.0):
        x = frame.x(tick)
        if x <= right + 1:
            anchor = "end" if x > frame.width - 24 else "middle"
            x = min(x, frame.width - 2) if anchor == "end" else x
            parts.append(f'<text x="{x:.1f}" y="{frame.height - 6}" text-anchor="{anchor}">{short_number(tick)}</text>')
    return "".join(parts)


def _line(frame: Frame, curve: Curve) -> str:
    line = f'<path d="{frame.path(thin(curve.drawn()))}" {_stroke(curve.colour)}/>'
    if curve.mean == "over":
        mean = f'<path d="{frame.path(thin(running_mean(curve.points)))}" {_stroke(curve.colour)}/>'
        return f'<g class="faint">{line}</g>{mean}'
    if len(curve.points) > MOST_DOTS:
        return line
    dots = (f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3"/>' for x, y in curve.points)
    return f'{line}<g class="f{curve.colour % NUM_COLOURS}">{"".join(dots)}</g>'


def _level(frame: Frame, name: str, value: float) -> str:
    y = frame.y(value)
    above = y - 5 if y > TOP + 14 else y + 14
    text = f"{escape(name)} {short_number(value)}"
    return (
        f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
        f'<text class="level-name" x="{WIDTH - RIGHT}" y="{above:.1f}" text-anchor="end">{text}</text>'
    )


def _tooltips(frame: Frame, curve: Curve, x_label: str) -> str:
    stride = math.ceil(len(curve.points) / MOST_TOOLTIPS)
    shown = curve.drawn()[::-1][::stride]  # from the end, so that the last value is among them
    parts = []
    for x, y in shown:
        text = escape(f"{curve.name}, {x_label} {x:g}: {y:.5g}" if curve.name else f"{x_label} {x:g}: {y:.5g}")
        parts.append(f'<circle cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="6"><title>{text}</title></circle>')
    return f'<g class="tips f{curve.colour % NUM_COLOURS}">{"".join(parts)}</g>'


def _scientific(value: float) -> str:
    if value == 0:
        return "0"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
