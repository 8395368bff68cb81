"""What `manylora inspect DATA` prints: facts, reasons, examples with what is learned of them, and counts."""

from __future__ import annotations

import codecs
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from manylora.cli.output import Output, aligned
from manylora.data.pieces import Piece, harmless, pieces_of
from manylora.look.lines import (
    BLOCKS,
    FULL,
    LINE_END,
    answers_line,
    balance_line,
    classes_of,
    facts_of,
    histogram,
    leakage_lines,
    length_line,
    repeat_lines,
    title_of,
)

if TYPE_CHECKING:
    from rich.text import Text

    from manylora.data.balance import Balance
    from manylora.data.example import Example
    from manylora.data.survey import Lengths
    from manylora.look.found import Found

MOST_CLASSES = 100
LEARNED, SPECIAL, TAG = "black on green", "cyan", "magenta"


class Screen:
    """Standard output for text that others wrote: nothing in it is obeyed, nothing that cannot be shown breaks it."""

    def __init__(self, output: Output):
        self._output = output
        self._encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        self.fancy = _can_encode(FULL + LINE_END + BLOCKS, self._encoding)
        shows_all = codecs.lookup(self._encoding).name == "utf-8"
        self.colours = sys.stdout.isatty() and shows_all and not os.environ.get("NO_COLOR") and not output.as_json

    def line(self, text: str = "") -> None:
        """Print a line of text, escapes in place of what a terminal would obey."""
        self._output.line(harmless(text).encode(self._encoding, "backslashreplace").decode(self._encoding))

    def title(self, text: str) -> None:
        """Print a line that begins a part."""
        self.line()
        self.line(text)

    def coloured(self, text: Text) -> None:
        """Print text with styles."""
        from rich.console import Console

        Console(highlight=False, markup=False, emoji=False).print(text, soft_wrap=True)


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return False
    return True


def show(screen: Screen, found: Found, examples: Sequence[Example]) -> None:
    """Print everything that was found."""
    facts = facts_of(found)
    width = max(map(len, facts))
    for name, value in facts.items():
        screen.line(f"{name:<{width}}  {value}")
    for line in found.notes():
        screen.line(f"note: {line}")
    _show_reasons(screen, found)
    if examples:
        _show_examples(screen, examples, found.tokenizer)
    for fault in found.missing:
        screen.title(f"no example: {fault}")
    _show_lengths(screen, found.survey.lengths)
    _show_lines(screen, "repeats", repeat_lines(found.survey.repeats))
    if found.survey.leakage is not None:
        _show_lines(screen, "held out and trained on", leakage_lines(found.survey.leakage))
    _show_balance(screen, found.survey.balance)
    screen.title(found.verdict())


def _show_reasons(screen: Screen, found: Found) -> None:
    if not found.reasons:
        return
    screen.title(f"rows that cannot be learned from: {found.num_bad:,} of {found.num_rows:,}")
    width = max(len(f"{reason.count:,}") for reason in found.reasons)
    for reason in found.reasons:
        screen.line(f"  {reason.count:>{width},}  {reason.kind}")
        screen.line(f"  {'':>{width}}    first {reason.where}: {reason.what}")


def _show_examples(screen: Screen, examples: Sequence[Example], tokenizer: Any) -> None:
    marked = "what is on green is learned" if screen.colours else "what stands in [[ ]] is learned"
    line_end = LINE_END if screen.fancy else "\\n"
    tags = "; after | the class of the token" if any(one.tags for one in examples) else ""
    screen.title(f"as the base is shown it: {marked}{tags}; {line_end} is a line end, special tokens are written out")
    for example in examples:
        screen.title(title_of(example))
        pieces = pieces_of(example, tokenizer)
        if screen.colours:
            screen.coloured(_styled(pieces, line_end))
        else:
            screen.line(bracketed(pieces, line_end))


def bracketed(pieces: Iterable[Piece], line_end: str) -> str:
    """Pieces as text with what is learned between brackets; a tag stands in the bracket of its own token."""
    parts: list[str] = []
    is_open = False
    for piece in pieces:
        if is_open and not piece.trained:
            parts.append("]]")
        if piece.trained and not is_open:
            parts.append("[[")
        is_open = piece.trained
        parts.append(_written(piece, line_end))
        if piece.tags:
            parts.append(f"|{','.join(piece.tags)}]]")
            is_open = False
    return "".join(parts) + ("]]" if is_open else "")


def _styled(pieces: Iterable[Piece], line_end: str) -> Text:
    from rich.text import Text

    text = Text()
    for piece in pieces:
        style = LEARNED if piece.trained else SPECIAL if piece.special else ""
        text.append(_written(piece, line_end), style=style)
        if piece.tags:
            text.append(f"|{','.join(piece.tags)}", style=TAG)
    return text


def _written(piece: Piece, line_end: str) -> str:
    return harmless(piece.text).replace("\n", f"{line_end}\n")


def _show_lengths(screen: Screen, lengths: Lengths) -> None:
    screen.title("lengths in tokens" + (", of whole rows" if lengths.above else ""))
    for line in histogram(lengths, screen.fancy):
        screen.line(line)
    screen.line(f"  {length_line(lengths)}")


def _show_lines(screen: Screen, title: str, lines: Iterable[str]) -> None:
    screen.title(title)
    for line in lines:
        screen.line(f"  {line}")


def _show_balance(screen: Screen, balance: Balance) -> None:
    for title, classes in classes_of(balance):
        screen.title(f"{title}: {balance_line(classes)}")
        rows = [(name, count, f"{count / classes.total:.1%}") for name, count in classes.counts.items()]
        for line in aligned(("class", "count", "share"), rows[:MOST_CLASSES]):
            screen.line(f"  {line}")
        if len(rows) > MOST_CLASSES:
            screen.line(f"  and {len(rows) - MOST_CLASSES:,} more, which --json and --html list")
    if balance.unseen:
        screen.title(f"classes that are held out and never trained on: {', '.join(balance.unseen)}")
    if balance.answers is not None:
        screen.title(answers_line(balance))
