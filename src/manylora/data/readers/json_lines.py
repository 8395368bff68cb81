"""JSON Lines: one object per line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from manylora.data.faults import RowFault
from manylora.data.readers.json_values import DECODER, ESCAPED_SURROGATE, broken_json, check_row
from manylora.data.readers.lines import lines_of
from manylora.data.rows import Row


def json_lines(stream: BufferedReader, file: str) -> Iterator[Row]:
    """A row per line that is not blank; a line that holds no object is a row with a fault."""
    for number, text, fault in lines_of(stream, file):
        if text.isspace():
            continue
        value: Any = None
        if fault is None:
            value, fault = _decoded(text.rstrip("\r\n"))
        yield Row({} if fault else value, file, number, fault)


def _decoded(text: str) -> tuple[Any, RowFault | None]:
    try:
        value = DECODER.decode(text)
    except RowFault as fault:
        return None, fault
    except json.JSONDecodeError as error:
        return None, broken_json(error.msg, error.pos + 1, text, error.pos)
    except (ValueError, RecursionError) as error:
        # a number of thousands of digits; thousands of brackets within each other
        return None, RowFault("broken JSON", f"JSON that cannot be read: {error}")
    return value, check_row(value, ESCAPED_SURROGATE.search(text) is not None)
