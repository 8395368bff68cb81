"""Values of JSON as rows, and what may be wrong with them."""

from __future__ import annotations

import json
import re
from typing import Any

from manylora.data.faults import RowFault

ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise RowFault("key given twice", f"the key {repeated!r} stands twice in one object")
    return value


DECODER = json.JSONDecoder(object_pairs_hook=_unique)
"""Raises RowFault where an object names a key twice: Python's own decoder would keep only the last."""


def check_row(value: Any, has_surrogates: bool) -> RowFault | None:
    """What keeps a decoded value from being a row; `has_surrogates`: its source holds an escape like \\ud83d."""
    if not isinstance(value, dict):
        return RowFault(
            "no object", f"a {kind_of(value)} where a row is expected", allowed='an object: {"column": value}'
        )
    if has_surrogates:
        # both halves of a pair have become one character; a half that is left can be in no text
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = ord(error.object[error.start])
            return RowFault(
                "half a character", f"the escape \\u{half:04x} is half of a character; the other is missing"
            )
    return None


def broken_json(message: str, column: int, line: str, place: int, hint: str | None = None) -> RowFault:
    """The fault of a text that is no JSON at `place` of `line`, which is character `column` of the whole line."""
    around = line[max(0, place - 20) : place + 20]
    return RowFault("broken JSON", f"broken JSON at character {column}: {message} (near {around!r})", next_step=hint)


def kind_of(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
