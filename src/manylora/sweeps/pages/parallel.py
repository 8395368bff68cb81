"""Parallel coordinates as inline SVG: one upright axis a searched key and one for the eval loss, one line a trial."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from statistics import median
from typing import Any

from manylora.config_text import dump_inline
from manylora.pages.charts import round_ticks, short_number
from manylora.sweeps.leaderboard import Entry, finite, searched_keys, short, short_names, values_text
from manylora.sweeps.pages.shades import fence, hover_line, mark

LOSS = "eval loss"
LEFT, RIGHT, TOP, BOTTOM = 92, 76, 40, 18
HEIGHT = 360
SPACING = 132
LEAST_WIDTH = 720
LABEL_GAP = 15
"""Least distance in y of two labels of an axis; the ones between are left out."""
LETTER = 6.6
"""About the width of a letter, to cut a label before it reaches the axis to its left."""
DECADES_FOR_LOG = 1.0
MOST_EXACT = 6
"""Different numbers up to which an axis is labelled with them and not with round ones."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Where the values of one key stand, from 0 (low) to 1 (high), and which of these places have a label."""

    kind: str
    place: Callable[[Any], float]
    labels: Sequence[tuple[float, str]]


def axis_of(values: Sequence[Any], *, most: float | None = None) -> Axis:
    """The axis that shows `values`: `log`, `linear`, or `category` where one of them is no number.

    Numbers that span a decade or more stand on a log axis if that brings their median nearer to its middle: a range
    that was searched evenly stays even. `most` bounds the axis: what is larger stands at its end. Categories stand
    evenly: numbers in order, then the rest by name.
    """
    if not all(_is_number(value) for value in values):
        return _categories(values)
    low, high = min(values), max(values)
    cut = most is not None and most < high
    high = most if cut and most is not None else high
    log = _is_log(low, median(values), high)
    exact = sorted({value for value in values if value <= high})
    if len(exact) > MOST_EXACT:
        exact = _powers(low, high) if log else round_ticks(low, high)
        if not log:
            low, high = exact[0], max(exact[-1], high)
    on = math.log10 if log else float
    span = on(high) - on(low)

    def place(value: float) -> float:
        return min(1.0, max(0.0, (on(value) - on(low)) / span)) if span > 0 else 0.5

    labels = [(place(value), short(float(value)) if isinstance(value, float) else str(value)) for value in exact]
    if cut:
        labels = [label for label in labels if label[0] < 1.0] + [(1.0, f"{short_number(high)} or more")]
    return Axis("log" if log else "linear", place, labels)


def parallel_coordinates(order: Sequence[Entry], winner: int | None) -> str:
    """A figure of trials given best first; the line of trial number `winner` lies on top. Empty without a key.

    A line is coloured by its trial's place; one without an eval loss is dashed and ends before the last axis.
    """
    keys = searched_keys(order)
    if not keys:
        return ""
    losses = [loss for entry in order if (loss := finite(entry.loss)) is not None]
    axes = [axis_of([entry.values[key] for entry in order if key in entry.values]) for key in keys]
    names = short_names(keys)
    if losses:
        axes.append(axis_of(losses, most=fence(losses)))
        keys, names = [*keys, LOSS], [*names, LOSS]
    width = max(LEAST_WIDTH, LEFT + RIGHT + SPACING * (len(axes) - 1))
    gap = (width - LEFT - RIGHT) / max(1, len(axes) - 1)
    parts = [_axis(LEFT + gap * index, gap, axis, key, name, right=index == len(axes) - 1)
             for index, (axis, key, name) in enumerate(zip(axes, keys, names, strict=True))]  # fmt: skip
    lines = []
    # later lines are drawn over earlier ones: the worst first, the winner after all others
    for index, entry in sorted(enumerate(order), key=lambda item: (item[1].trial == winner, -item[0])):
        path = _path(entry, keys, axes, gap)
        if path:
            kind = mark(index, len(losses), won=entry.trial == winner)
            lines.append(hover_line(path, path, kind, describe(index + 1, entry)))
    note = "lower eval loss is better" if losses else "no eval loss yet"
    label = escape(f"{len(lines)} trials over {', '.join(names)}; the leaderboard holds the same values")
    return (
        f"<figure><figcaption>Every trial is a line <span>{note}</span></figcaption>"
        f'<div class="scroll"><svg class="parallel" viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}" '
        f'style="min-width:{round(width * 0.8)}px">{"".join(lines)}{"".join(parts)}</svg></div></figure>'
    )


def describe(place: int, entry: Entry) -> str:
    """A trial in one line, for a tooltip: number, state, loss with place, and every searched value."""
    loss = finite(entry.loss)
    score = f"eval loss {loss:.5g}, place {place}" if loss is not None else "no eval loss"
    return f"trial {entry.trial}, {entry.state}: {score}; {values_text(entry)}"


def _path(entry: Entry, keys: Sequence[str], axes: Sequence[Axis], gap: float) -> str:
    """The line through the trial's values; broken where it has none."""
    loss = finite(entry.loss)
    values = {**entry.values, **({LOSS: loss} if loss is not None else {})}
    path, joined = "", False
    for index, (key, axis) in enumerate(zip(keys, axes, strict=True)):
        if key in values:
            path += f"{'L' if joined else 'M'}{LEFT + gap * index:.1f} {_y(axis.place(values[key])):.1f}"
        joined = key in values
    return path


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _axis(x: float, gap: float, axis: Axis, key: str, name: str, *, right: bool) -> str:
    """One axis; the labels of the last one stand on its right, where no lines are."""
    room = int(min(gap, LEFT + 14) / LETTER) - 2
    shown = _cut(name, int(gap / LETTER), key)
    parts = [
        f'<path class="axis" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>',
        f'<text class="name" x="{x:.1f}" y="{TOP - 18}" text-anchor="middle">{shown}</text>',
    ]
    last = math.inf
    # the ends of an axis say most: they are labelled first, then what finds room between them
    for share, text in sorted(axis.labels, key=lambda label: -label[0]):
        y = _y(share)
        if last is math.inf or y - last >= LABEL_GAP:
            at, anchor, way = (x + 8, "start", 4) if right else (x - 8, "end", -4)
            parts.append(f'<path class="axis" d="M{x:.1f} {y:.1f}h{way}"/>')
            parts.append(f'<text x="{at:.1f}" y="{y + 4:.1f}" text-anchor="{anchor}">{_cut(text, room, text)}</text>')
            last = y
    return "".join(parts)


def _cut(text: str, letters: int, full: str) -> str:
    if len(text) <= letters:
        return escape(text)
    return f"{escape(text[: max(1, letters - 3)])}...<title>{escape(full)}</title>"


def _categories(values: Sequence[Any]) -> Axis:
    found = {dump_inline(value): value for value in values}
    numbers = sorted((name for name in found if _is_number(found[name])), key=lambda name: found[name])
    names = [*numbers, *sorted(name for name in found if name not in numbers)]
    shares = {name: index / (len(names) - 1) if len(names) > 1 else 0.5 for index, name in enumerate(names)}
    return Axis("category", lambda value: shares[dump_inline(value)], [(shares[name], name) for name in names])


def _powers(low: float, high: float) -> list[float]:
    """Powers of ten from low to high; with twice and five times them where these are few."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5)):
        found = [factor * 10.0**exponent for exponent in exponents for factor in factors]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) >= 3:
            break
    return found or [low, high]


def _is_log(low: float, middle: float, high: float) -> bool:
    if low <= 0 or math.log10(high) - math.log10(low) < DECADES_FOR_LOG:
        return False
    share = (math.log(middle) - math.log(low)) / (math.log(high) - math.log(low))
    return abs(share - 0.5) < abs((middle - low) / (high - low) - 0.5)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
