"""What the drawings of a sweep share: a trial's colour is its place, the winner stands out, lines have tooltips."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

NUM_SHADES = 8
"""Colours from the best eighth of the trials, `s0`, to the worst, `s7`."""

STYLE = """
:root{--s0:#08306b;--s1:#0b559f;--s2:#2b7bba;--s3:#539ecd;--s4:#82b6d6;--s5:#a6bfd0;--s6:#b9c0c8;--s7:#c6c8ca;
--won:#d55e00}
@media (prefers-color-scheme:dark){:root{--s0:#d9efff;--s1:#a9d6f7;--s2:#79b9ea;--s3:#5199d0;--s4:#3f7cae;--s5:#3f6485;
--s6:#465665;--s7:#494f56;--won:#ff8a47}}
.s0{stroke:var(--s0)}.s1{stroke:var(--s1)}.s2{stroke:var(--s2)}.s3{stroke:var(--s3)}.s4{stroke:var(--s4)}
.s5{stroke:var(--s5)}.s6{stroke:var(--s6)}.s7{stroke:var(--s7)}.no{stroke:var(--soft);stroke-dasharray:3 4}
svg .trial path{stroke-width:1.5}svg .trial .won{stroke:var(--won);stroke-width:3.5}
svg .trial .hit{stroke:transparent;stroke-width:10;pointer-events:stroke}
svg .trial:hover path:first-of-type{stroke:var(--ink);stroke-width:4}
svg .axis{stroke:var(--soft);stroke-width:1}
svg.parallel{margin:auto}
svg.parallel text{font-size:12px;paint-order:stroke;stroke:var(--card);stroke-width:4px;stroke-linejoin:round}
svg .name,svg.parallel .name{fill:var(--ink);font-weight:600}
svg .spread{stroke:var(--s2)}svg .mean{fill:var(--s1)}
figure>.scroll{overflow-y:hidden}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(430px,100%),1fr));gap:14px;margin-top:14px}
.narrow{max-width:620px}
.shades{display:flex;flex-wrap:wrap;align-items:center;gap:4px 20px;margin:0 0 12px;padding:0;list-style:none;
font-size:.875rem}
.shades svg{margin-right:8px;vertical-align:middle}.shades .scale path{stroke-width:9;stroke-linecap:butt}
table.ranks{font-size:.875rem;white-space:nowrap}table.ranks td,table.ranks th{padding-right:20px}
table.led tbody tr:first-child{background:var(--well);box-shadow:inset 3px 0 var(--won)}
table.led tbody tr:first-child>*{font-weight:600}table.led tbody th:first-child{padding-left:12px}
table.led thead th:first-child{padding-left:12px}
table.bars{max-width:720px}table.bars td:nth-child(2){width:60%}
table.bars th,table.bars td:last-child{white-space:nowrap}table.bars td:last-child{text-align:right;padding-right:0}
.bar{display:block;height:14px;margin-top:5px;min-width:2px;background:var(--s2);border-radius:3px}
"""


def mark(index: int, count: int, *, won: bool = False) -> str:
    """The class of a trial's line: of `count` trials with a loss it is number `index`, from 0 for the best."""
    if index >= count:
        return "no"
    return "won" if won else f"s{index * NUM_SHADES // count}"


def hover_line(path: str, hit: str, kind: str, text: str) -> str:
    """A line of an SVG with a tooltip; `hit` is the wider, unseen line that the pointer has to meet."""
    return (
        f'<g class="trial"><title>{escape(text)}</title><path class="{kind}" d="{path}"/>'
        f'<path class="hit" d="{hit}"/></g>'
    )


def key(*, winner: bool, without_loss: bool) -> str:
    """What the colours mean."""
    swatches = "".join(f'<path class="s{shade}" d="M{shade * 12} 5h12"/>' for shade in range(NUM_SHADES))
    scale = f'<svg class="scale" viewBox="0 0 96 10" width="96" height="10">{swatches}</svg>'
    items = [f"{scale}lowest to highest eval loss, by place"]
    if winner:
        items.append(
            f'<svg viewBox="0 0 24 8" width="24" height="8"><g class="trial">{_short("won")}</g></svg>the best'
        )
    if without_loss:
        items.append(f'<svg viewBox="0 0 24 8" width="24" height="8">{_short("no")}</svg>no eval loss yet')
    return f'<ul class="shades">{"".join(f"<li>{item}</li>" for item in items)}</ul>'


def _short(kind: str) -> str:
    return f'<path class="{kind}" d="M0 4H24"/>'


def fence(values: Sequence[float]) -> float:
    """The largest of the values that is no outlier: at most three times the middle half's width above that half.

    Axes end there, so that one member that diverged does not press all others flat.
    Source: Tukey, Exploratory Data Analysis (1977), the outer fence of a box plot.
    """
    order = sorted(values)
    lower, upper = order[len(order) // 4], order[(3 * len(order)) // 4]
    limit = upper + 3.0 * (upper - lower)
    return max((value for value in order if value <= limit), default=order[-1])
