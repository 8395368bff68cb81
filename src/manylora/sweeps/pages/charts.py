"""Drawings of a sweep as inline SVG and HTML: the curves of all members, bars of importance, spread over repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from manylora.pages.charts import (
    BOTTOM,
    LEFT,
    RIGHT,
    TOP,
    Frame,
    Points,
    axes,
    round_ticks,
    short_number,
    thin,
)
from manylora.sweeps.leaderboard import Entry, finite
from manylora.sweeps.pages.shades import fence, hover_line, mark

WIDTH, HEIGHT = 500, 310
MOST_CURVES = 200
"""Members that are drawn, those of the best trials; more cannot be told apart and make a heavy page."""
MOST_POINTS = 16_000
"""Points of all curves of a chart together."""
FEWEST_POINTS, MOST_POINTS_OF_ONE = 40, 400
HIT_POINTS = 40
ROW, NAME = 24, 84


@dataclass(frozen=True, slots=True)
class MemberCurve:
    """One member's finite (trained tokens, value) points in order, its trial's place from 0, and its tooltip."""

    text: str
    points: Points
    place: int
    won: bool = False


def member_curves(title: str, curves: Sequence[MemberCurve], *, num_ranked: int, levels: Sequence[float] = ()) -> str:
    """A figure of one line a member over trained tokens, coloured by the trial's place among `num_ranked`.

    Values far above the others run along the upper edge. `levels` are upright lines. Empty without a point.
    """
    curves = sorted((curve for curve in curves if curve.points), key=lambda curve: curve.place)
    left_out = len(curves) - MOST_CURVES
    curves = curves[:MOST_CURVES]
    if not curves:
        return ""
    values = [y for curve in curves for _, y in curve.points]
    high = fence(values)
    end = max(1.0, *(curve.points[-1][0] for curve in curves))
    frame = Frame(end, round_ticks(min(values), high), WIDTH, HEIGHT)
    upper = frame.y_ticks[-1]
    most = min(MOST_POINTS_OF_ONE, max(FEWEST_POINTS, MOST_POINTS // len(curves)))
    parts = [axes(frame)]
    for level in levels:
        if level <= end:
            x = frame.x(level)
            parts.append(f'<path class="level" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}">'
                         f"<title>judged at {level:,.0f} tokens</title></path>")  # fmt: skip
    # the best are drawn last, over the others
    for curve in sorted(curves, key=lambda curve: (curve.won, -curve.place)):
        points = [(x, min(y, upper)) for x, y in curve.points]
        line, hit = _path(frame, thin(points, most)), _path(frame, thin(points, HIT_POINTS))
        parts.append(hover_line(line, hit, mark(curve.place, num_ranked, won=curve.won), curve.text))
    remarks = ["by trained tokens"]
    if max(values) > upper:
        remarks.append("what is higher runs along the top")
    if levels:
        remarks.append("dashed: where trials are judged")
    if left_out > 0:
        remarks.append(f"{left_out} worse members left out")
    label = escape(f"{title} of {len(curves)} members by trained tokens")
    return (
        f"<figure><figcaption>{escape(title)} <span>{escape('; '.join(remarks))}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def importance_bars(shares: Mapping[str, float]) -> str:
    """A table of a bar and a percentage for each key, the largest first."""
    largest = max(shares.values(), default=0.0) or 1.0
    rows = []
    for key, share in sorted(shares.items(), key=lambda item: -item[1]):
        bar = f'<span class="bar" style="width:{max(0.0, share) / largest:.1%}"></span>'
        rows.append(f'<tr><th scope="row">{escape(key)}</th><td>{bar}</td><td>{share:.0%}</td></tr>')
    return f'<div class="scroll"><table class="bars"><tbody>{"".join(rows)}</tbody></table></div>' if rows else ""


def spread_chart(entries: Sequence[Entry]) -> str:
    """A figure of mean and standard deviation of each trial that has several members, in the given order."""
    shown = [(entry, loss, spread) for entry in entries
             if (loss := finite(entry.loss)) is not None and (spread := finite(entry.spread)) is not None]  # fmt: skip
    if not shown:
        return ""
    # as on the loss axis, a trial of which one member diverged must not press the others flat
    high = fence([loss + spread for _, loss, spread in shown])
    ticks = round_ticks(min(loss - spread for _, loss, spread in shown), high)
    height = TOP + ROW * len(shown) + BOTTOM

    def x(value: float) -> float:
        share = (min(value, ticks[-1]) - ticks[0]) / (ticks[-1] - ticks[0])
        return NAME + share * (WIDTH - NAME - RIGHT - LEFT / 2)

    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{x(tick):.1f} {TOP}V{height - BOTTOM}"/>')
        parts.append(f'<text x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle">{short_number(tick)}</text>')
    for row, (entry, loss, spread) in enumerate(shown):
        y = TOP + ROW * (row + 0.5)
        text = escape(f"trial {entry.trial}: {loss:.5g}, standard deviation {spread:.2g} over {len(entry.members)}")
        parts.append(
            f"<g><title>{text}</title>"
            f'<text x="{NAME - 12}" y="{y + 4:.1f}" text-anchor="end">trial {entry.trial}</text>'
            f'<path class="spread" d="M{x(loss - spread):.1f} {y:.1f}H{x(loss + spread):.1f}"/>'
            f'<circle class="mean" cx="{x(loss):.1f}" cy="{y:.1f}" r="4.5"/></g>'
        )
    return (
        "<figure><figcaption>Eval loss of the best trials <span>mean and standard deviation over members</span>"
        f'</figcaption><svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Mean and standard deviation of the '
        f'eval loss of {len(shown)} trials; the leaderboard holds the same numbers">{"".join(parts)}</svg></figure>'
    )


def _path(frame: Frame, points: Points) -> str:
    # a line of no length, so that a single point is a round dot
    return frame.path(points) + ("h0" if len(points) == 1 else "")
