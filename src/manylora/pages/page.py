"""Building blocks of a self-contained HTML page: no scripts, no network, light and dark, narrow and wide.

Every function takes plain text and escapes it, except where an argument is called `html`.
"""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1c1e21;--soft:#63686f;--line:#e3e4e2;--accent:#0072b2;
--well:#f3f4f2;--warn:#fdf3dc;--warn-line:#e5c878;
--c0:#0072b2;--c1:#d55e00;--c2:#009e73;--c3:#b8568f;--c4:#b97a00;--c5:#4a4f9c}
@media (prefers-color-scheme:dark){:root{--page:#15171a;--card:#1d2024;--ink:#e7e8ea;--soft:#a0a6ae;--line:#32363c;
--accent:#5cb3e8;--well:#17191d;--warn:#372d14;--warn-line:#6d5a26;
--c0:#5cb3e8;--c1:#ff8a47;--c2:#3fcf9f;--c3:#e39bc6;--c4:#f0b840;--c5:#a3a8f5}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1140px;padding:40px 24px 64px;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;overflow-wrap:anywhere;
-webkit-text-size-adjust:100%}
h1{margin:0;font-size:1.9rem;line-height:1.2;letter-spacing:-.015em}
h2{margin:48px 0 14px;font-size:1.2rem;letter-spacing:-.005em}
p{margin:6px 0}a{color:var(--accent)}
.kicker{color:var(--accent);font-size:.8rem;font-weight:600;letter-spacing:.06em;text-transform:uppercase}
.soft{color:var(--soft)}.small{font-size:.875rem}
.notice{margin:18px 0;padding:10px 16px;background:var(--warn);border:1px solid var(--warn-line);border-radius:8px}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(136px,45%),1fr));gap:10px;margin:24px 0 0}
.tiles div,figure,.sample{background:var(--card);border:1px solid var(--line);border-radius:10px}
.tiles div{padding:12px 14px}
.tiles dt{color:var(--soft);font-size:.82rem}
.tiles dd{margin:2px 0 0;font-size:1.45rem;font-weight:600;line-height:1.25;font-variant-numeric:tabular-nums}
.tiles dd+dd{font-size:.82rem;font-weight:400;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(330px,100%),1fr));gap:14px}
figure{margin:0;padding:12px 12px 6px}
figcaption{font-weight:600;font-size:.92rem;padding:0 4px 6px}figcaption span{color:var(--soft);font-weight:400}
figure svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font:13px system-ui,-apple-system,"Segoe UI",Roboto,Arial,sans-serif}
svg path{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}
svg .grid{stroke:var(--line);stroke-width:1}
svg .level{stroke:var(--soft);stroke-width:1.5;stroke-dasharray:5 5}
svg .faint{opacity:.3}svg .faint path{stroke-width:1}
.k0{stroke:var(--c0)}.k1{stroke:var(--c1)}.k2{stroke:var(--c2)}.k3{stroke:var(--c3)}.k4{stroke:var(--c4)}
.k5{stroke:var(--c5)}
.f0{fill:var(--c0)}.f1{fill:var(--c1)}.f2{fill:var(--c2)}.f3{fill:var(--c3)}.f4{fill:var(--c4)}.f5{fill:var(--c5)}
.tips circle{opacity:0}.tips circle:hover{opacity:1}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;margin:0 0 12px;padding:0;list-style:none;font-size:.875rem}
.legend svg{margin-right:7px;vertical-align:middle}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:7px 16px 7px 0;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
thead th{color:var(--soft);font-size:.82rem;font-weight:500}tbody th{font-weight:500}
table.numbers td,table.numbers thead th+th{text-align:right;white-space:nowrap}
table.numbers{max-width:640px}table.facts{font-size:.9rem}table.facts th{width:32%;color:var(--soft);font-weight:400}
.sample{margin:0 0 14px;padding:14px 16px}
.sample h3{margin:0 0 2px;color:var(--soft);font-size:.78rem;font-weight:500}
.sample .text{white-space:pre-wrap}.sample .prompt{margin-bottom:12px}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(240px,100%),1fr));gap:12px 24px;
border-top:1px solid var(--line);padding-top:10px}
.after{border-left:3px solid var(--accent);padding-left:12px}
pre{margin:0 0 10px;padding:12px 14px;background:var(--well);border:1px solid var(--line);border-radius:8px;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre-wrap}
summary{cursor:pointer;margin-bottom:10px;color:var(--accent)}
footer{margin-top:56px;color:var(--soft);font-size:.82rem}
@media (max-width:560px){body{padding:24px 14px 48px}h1{font-size:1.5rem}
th,td{padding-right:10px}table.numbers{font-size:.9rem}}
@media print{body{max-width:none;padding:0}figure,.sample,tr{break-inside:avoid}}
"""


def page(title: str, html: str, *, style: str = "") -> str:
    """The whole document; `style` is added to the style sheet."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n{html}\n</body>\n</html>\n"
    )


def section(title: str, *html: str) -> str:
    """A titled part; empty when it would hold nothing."""
    body = "\n".join(part for part in html if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>" if body else ""


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Large numbers side by side, each (name, value, remark)."""
    parts = []
    for name, value, remark in facts:
        below = f"<dd>{escape(remark)}</dd>" if remark else ""
        parts.append(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>{below}</div>")
    return f'<dl class="tiles">{"".join(parts)}</dl>' if parts else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str) -> str:
    """A table whose first column names the row; `kind` is `numbers` or `facts`. Empty without rows."""
    body = []
    for first, *others in rows:
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in others)
        body.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    if not body:
        return ""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    top = f"<thead><tr>{names}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{top}<tbody>{"".join(body)}</tbody></table></div>'


def code(text: str) -> str:
    """A block of commands or a file, as it is."""
    return f"<pre>{escape(text)}</pre>"


def folded(title: str, html: str) -> str:
    """A part that is closed until it is clicked; empty when there is nothing in it."""
    return f"<details><summary>{escape(title)}</summary>\n{html}\n</details>" if html else ""


def paragraph(text: str, kind: str = "") -> str:
    """One paragraph; `kind` is a class of the style sheet."""
    return f'<p class="{kind}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"
