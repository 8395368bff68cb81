"""Plain text: one row per paragraph."""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedReader

from manylora.data.readers.lines import lines_of
from manylora.data.rows import Row


def paragraphs(stream: BufferedReader, file: str) -> Iterator[Row]:
    r"""A row {"text": ...} per paragraph; blank lines part them, and \r\n within one becomes \n."""
    lines: list[str] = []
    start, bad = 0, None
    for number, text, fault in lines_of(stream, file):
        if fault is None and not text.strip():
            if lines:
                yield bad or Row({"text": "\n".join(lines)}, file, start)
            lines, bad = [], None
            continue
        start = start if lines else number
        lines.append(text.removesuffix("\n").removesuffix("\r"))
        if fault is not None and bad is None:
            bad = Row({}, file, number, fault)
    if lines:
        yield bad or Row({"text": "\n".join(lines)}, file, start)
