"""What verbs print: lines and tables for people, one JSON object for programs."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="End standard output with one line that is a JSON object.")]


class Output:
    """Standard output of one verb: text for people, or with `as_json` the final object alone."""

    def __init__(self, as_json: bool):
        self.as_json = as_json

    def line(self, text: str = "") -> None:
        """Print a line for people."""
        if not self.as_json:
            print(text, flush=True)

    def table(self, head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """Print aligned columns; numbers stand to the right."""
        for line in aligned(head, rows):
            self.line(line)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Print the JSON object, where it was asked for."""
        if self.as_json:
            print(json.dumps(_plain(result), allow_nan=False), flush=True)


def note(text: str) -> None:
    """Print a line on stderr: what was chosen and why."""
    print(text, file=sys.stderr, flush=True)


def aligned(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a table, two spaces between the columns."""
    body = [[_cell(value) for value in row] for row in rows]
    numeric = [bool(body) and all(_is_number(row[place]) for row in body) for place in range(len(head))]
    widths = [max(len(row[place]) for row in [list(head), *body]) for place in range(len(head))]
    lines = []
    for row in [list(head), *body]:
        cells = zip(row, widths, numeric, strict=True)
        lines.append(
            "  ".join(text.rjust(width) if right else text.ljust(width) for text, width, right in cells).rstrip()
        )
    return lines


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "-" if value is None else str(value)
    )


def _is_number(text: str) -> bool:
    try:
        float(text.replace(",", ""))
    except ValueError:
        return text == "-"
    return True


def _plain(value: Any) -> Any:
    """Values that JSON holds: paths as text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
