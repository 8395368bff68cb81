"""What data hold as one self-contained HTML page: the facts, a histogram, and examples token by token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from manylora.data.pieces import Piece, harmless, pieces_of
from manylora.files import write_text_atomic
from manylora.look.lines import (
    LINE_END,
    answers_line,
    balance_line,
    classes_of,
    facts_of,
    leakage_lines,
    length_line,
    repeat_lines,
    title_of,
)
from manylora.pages.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, round_ticks, short_number
from manylora.pages.page import page, paragraph, section, table, tiles

if TYPE_CHECKING:
    from pathlib import Path

    from manylora.data.example import Example
    from manylora.data.survey import Lengths, Survey
    from manylora.look.found import Found

STYLE = """<style>
.tokens{white-space:pre-wrap;font:14px/1.7 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.tokens span:hover{outline:1px solid var(--ink);outline-offset:-1px}
.t{background:color-mix(in srgb,var(--c2) 28%,transparent)}
.s{color:var(--c5);font-weight:600}
.tokens sup{color:var(--c3);font-size:.72em;line-height:0}
#filter{width:100%;margin:0 0 14px;padding:8px 12px;font:inherit;color:inherit;background:var(--card);
border:1px solid var(--line);border-radius:8px}
svg .mark{stroke:var(--c1);stroke-width:1.5;stroke-dasharray:4 3}svg .bar:hover{opacity:.7}
</style>"""
SCRIPT = """<script>
const samples=[...document.querySelectorAll('.sample')],count=document.getElementById('count');
document.getElementById('filter').addEventListener('input',event=>{
const wanted=event.target.value.toLowerCase();let shown=0;
for(const sample of samples){sample.hidden=!sample.textContent.toLowerCase().includes(wanted);shown+=!sample.hidden}
count.textContent=shown;
});
</script>"""


def write_page(path: Path, name: str, found: Found, examples: Sequence[Example]) -> None:
    """Write the page of data called `name`.

    Raises:
        DiskFull: no space.
    """
    survey = found.survey
    facts = [(fact, harmless(value)) for fact, value in facts_of(found).items()]
    repeats = [harmless(line) for line in repeat_lines(survey.repeats)]
    leakage = [harmless(line) for line in leakage_lines(survey.leakage)] if survey.leakage else []
    parts = [
        STYLE,
        f'<header><p class="kicker">Data</p><h1>{escape(harmless(name, keep=""))}</h1></header>',
        f'<p class="notice">{escape(found.verdict())}</p>' if found.num_bad else "",
        tiles(_headline(found)),
        section("Facts", table((), facts, "facts")),
        section("Rows that cannot be learned from", _reasons(found)),
        section("Notes", "".join(paragraph(harmless(line)) for line in found.notes())),
        section("Lengths", length_chart(survey.lengths), paragraph(length_line(survey.lengths), "small soft")),
        section("Repeats", *map(_indented, repeats)),
        section("Held out and trained on", *map(_indented, leakage)),
        section("Classes", *_classes(survey)),
        section("Examples", _samples(examples, found.tokenizer)),
        f"<footer>Written by manylora; {escape(found.verdict())}.</footer>",
        SCRIPT if examples else "",
    ]
    write_text_atomic(path, page(f"{harmless(name, keep='')} - manylora", "\n".join(part for part in parts if part)))


def _headline(found: Found) -> list[tuple[str, str, str]]:
    totals, packed = found.survey.totals, found.survey.packed
    trained = [("Trained tokens", short_number(totals.num_trained), f"{totals.share_trained:.1%} of the tokens")]
    return [
        ("Rows", f"{found.num_rows:,}", f"{found.num_bad:,} cannot be learned from" if found.num_bad else "all good"),
        ("Examples", f"{totals.num_examples:,}", ""),
        ("Tokens", short_number(totals.num_tokens), f"{totals.mean:,.1f} an example"),
        *(trained if totals.num_trained else []),
        ("Packed rows", f"{packed.num_rows:,}", f"{packed.share_used:.1%} no padding"),
    ]


def _reasons(found: Found) -> str:
    rows = [(f"{reason.count:,} {reason.kind}", harmless(f"{reason.where}: {reason.what}")) for reason in found.reasons]
    return table(("rows, and why", "the first of them"), rows, "facts")


def _indented(line: str) -> str:
    depth = (len(line) - len(line.lstrip())) // 2
    return f'<p style="margin-left:{1.4 * depth:.1f}em">{escape(line.strip())}</p>'


def _classes(survey: Survey) -> list[str]:
    html = []
    for title, classes in classes_of(survey.balance):
        rows = [
            (harmless(name), f"{count:,}", f"{count / classes.total:.1%}") for name, count in classes.counts.items()
        ]
        html.append(paragraph(f"{title}: {balance_line(classes)}"))
        html.append(table(("class", "count", "share"), rows, "numbers"))
    if survey.balance.unseen:
        unseen = ", ".join(map(harmless, survey.balance.unseen))
        html.append(paragraph(f"classes that are held out and never trained on: {unseen}"))
    if survey.balance.answers is not None:
        html.append(paragraph(answers_line(survey.balance)))
    return html


def length_chart(lengths: Lengths) -> str:
    """A histogram as inline SVG: a bar for each bin, dashed lines at the percentiles and at the rows' length."""
    x_end, y_ticks = lengths.edges[-1], round_ticks(0.0, max(lengths.counts), least=1.0)
    width = WIDTH * 2  # a bar chart of its own on the page is as wide as two curves

    def x(value: float) -> float:
        return LEFT + value / x_end * (width - LEFT - RIGHT)

    def y(value: float) -> float:
        return HEIGHT - BOTTOM - value / y_ticks[-1] * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick):.1f}H{width - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y(tick) + 4:.1f}" text-anchor="end">{short_number(tick)}</text>')
    for low, high, count in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
        title = escape(f"{low + 1:,} to {high:,} tokens: {count:,}")
        bar_width, bar_height = max(x(high) - x(low) - 1, 0.5), HEIGHT - BOTTOM - y(count)
        parts.append(
            f'<rect class="bar f0" x="{x(low) + 0.5:.1f}" y="{y(count):.1f}" width="{bar_width:.1f}" '
            f'height="{bar_height:.1f}"><title>{title}</title></rect>'
        )
    parts += [
        f'<text x="{x(tick):.1f}" y="{HEIGHT - 6}" text-anchor="middle">{short_number(tick)}</text>'
        for tick in round_ticks(0.0, x_end, least=1.0)
        if tick <= x_end
    ]
    marks = [(f"p{percent}", value) for percent, value in lengths.percentiles.items()]
    marks += [("row_tokens", lengths.limit)] if lengths.limit <= x_end else []
    for level, (name, value) in enumerate(marks):
        anchor, shift = ("end", -4) if x(value) > width / 2 else ("start", 4)
        place = f'x="{x(value) + shift:.1f}" y="{TOP + 12 + 15 * level}"'
        kind = "level" if name == "row_tokens" else "mark"
        parts.append(f'<path class="{kind}" d="M{x(value):.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text {place} text-anchor="{anchor}">{name} {value:,}</text>')
    caption = "<figcaption>Examples <span>by length in tokens</span></figcaption>"
    label = "Examples by length in tokens"
    return (
        f'<figure>{caption}<svg viewBox="0 0 {width} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
        "</figure>"
    )


def _samples(examples: Sequence[Example], tokenizer: Any) -> str:
    if not examples:
        return ""
    total = len(examples)
    legend = (
        f'<p class="small soft"><span id="count">{total}</span> of {total} shown. '
        '<span class="t">What is learned</span> has a ground of its own, <span class="s">special tokens</span> are '
        f"written out, {LINE_END} is a line end. Hover over a token for its number.</p>"
    )
    box = '<input id="filter" type="search" placeholder="Show examples that hold ..." aria-label="Filter examples">'
    return legend + box + "\n".join(_sample(example, pieces_of(example, tokenizer)) for example in examples)


def _sample(example: Example, pieces: Iterable[Piece]) -> str:
    spans = "".join(map(_span, pieces))
    title = escape(harmless(title_of(example), keep=""))
    return f'<article class="sample"><h3>{title}</h3><div class="tokens">{spans}</div></article>'


def _span(piece: Piece) -> str:
    kinds = " ".join(name for name, is_so in (("t", piece.trained), ("s", piece.special)) if is_so)
    kind = f' class="{kinds}"' if kinds else ""
    text = escape(harmless(piece.text)).replace("\n", f"{LINE_END}\n")
    tags = f"<sup>{escape(harmless(','.join(piece.tags), keep=''))}</sup>" if piece.tags else ""
    return f'<span{kind} title="{" ".join(map(str, piece.tokens))}">{text}</span>{tags}'
