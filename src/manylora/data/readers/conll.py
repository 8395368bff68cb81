"""CoNLL columns: one token per line with its tag in the last column, a blank line between sentences."""

from __future__ import annotations

import re
from collections.abc import Iterator
from io import BufferedReader

from manylora.data.faults import RowFault
from manylora.data.readers.lines import lines_of
from manylora.data.rows import Row

Line = tuple[int, str, RowFault | None]
KEY_AND_VALUE = re.compile(r"# \S+ = ")


def sentences(stream: BufferedReader, file: str) -> Iterator[Row]:
    """A row {"tokens": [...], "tags": [...]} per sentence: the first and the last column of its lines.

    Tabs part the columns of a line that holds one, else spaces do. -DOCSTART- lines and comments are left out. A
    sentence with a bad line is one row with a fault, and `line` is the bad line.
    """
    sentence: list[Line] = []
    for number, text, fault in lines_of(stream, file):
        text = text.removesuffix("\n").removesuffix("\r")
        if text.strip() and not text.startswith("-DOCSTART-"):
            sentence.append((number, text, fault))
            continue
        yield from _row(sentence, file)
        sentence = []
    yield from _row(sentence, file)


def _row(sentence: list[Line], file: str) -> Iterator[Row]:
    lines = _without_comments(sentence)
    if not lines:
        return
    tokens: list[str] = []
    tags: list[str] = []
    num_columns = len(_columns(lines[0][1]))
    for number, text, fault in lines:
        columns = _columns(text)
        fault = fault or _fault(columns, num_columns)
        if fault is not None:
            yield Row({}, file, number, fault)
            return
        tokens.append(columns[0])
        tags.append(columns[-1])
    yield Row({"tokens": tokens, "tags": tags}, file, lines[0][0])


def _columns(text: str) -> list[str]:
    return text.split("\t") if "\t" in text else text.split()


def _fault(columns: list[str], num_columns: int) -> RowFault | None:
    if len(columns) != num_columns:
        return RowFault(
            "wrong number of fields", f"{len(columns)} columns where the sentence's first line has {num_columns}"
        )
    if num_columns < 2:
        return RowFault(
            "wrong number of fields", "1 column where a token and its tag are expected", allowed="token first, tag last"
        )
    if not (columns[0].strip() and columns[-1].strip()):
        return RowFault("empty column", f"the {'tag' if columns[0].strip() else 'token'} is empty")
    return None


def _without_comments(sentence: list[Line]) -> list[Line]:
    """The lines from the first token on. `# O` at the start may be the token `#` as well as a comment."""
    count = 0
    while count < len(sentence) and sentence[count][1].startswith("# ") and "\t" not in sentence[count][1]:
        count += 1
    rest = sentence[count:]
    width = len(_columns(rest[0][1])) if rest else 2
    tabbed = bool(rest) and "\t" in rest[0][1]
    kept = [
        line
        for line in sentence[:count]
        if not (tabbed or KEY_AND_VALUE.match(line[1]) or len(_columns(line[1])) != width)
    ]
    return kept + rest
