"""Plain text."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from manylora.data.formats.format import Kind, Overflow, Shown, end_of, fronted, text_of
from manylora.data.tokens import Marked, TokenRules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manylora.data.rows import Row


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text: every token is learned but the first, which nothing comes before; EOS is appended."""

    name: str = "text"
    kind: Kind = "sequence"
    columns: tuple[str, ...] = ("text",)
    also: tuple[tuple[str, ...], ...] = ()
    optional: tuple[str, ...] = ()
    overflows: tuple[Overflow, ...] = ("split", "error", "right")

    def fits(self, row: Row) -> bool:
        return "text" in row.values

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        text = text_of(row, "text")
        return (Shown((text,), partial(_mark, rules=rules), prompt="", reference=text, group=text),)


def _mark(encoded: Sequence[list[int]], *, rules: TokenRules) -> Marked:
    tokens = [*fronted(encoded[0], rules), *end_of(encoded[0], rules)]
    return Marked(tokens, [(1, len(tokens))] if len(tokens) > 1 else [])


TEXT = Text()
