"""A JSON file with a list of objects, decoded item by item from a buffer that forgets what has been read."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from io import BufferedReader
from typing import Any

from manylora.data.faults import RowFault
from manylora.data.readers.json_values import DECODER, ESCAPED_SURROGATE, broken_json, check_row, kind_of
from manylora.data.readers.lines import check_encoding, not_utf8
from manylora.data.rows import Row
from manylora.errors import DataError

CHUNK_BYTES = 1 << 16
SPACE = re.compile(r"[ \t\r\n]*")
BAD_BYTE = re.compile("[\udc80-\udcff]")
LONGEST_SIGN = 16  # characters at the end of a buffer, within which an escape, a number or -Infinity may be cut
PLAIN = json.JSONDecoder()


def json_list(stream: BufferedReader, file: str) -> Iterator[Row]:
    """The objects of a list, or of the list under "data" of one object.

    Raises:
        DataError: broken JSON (nothing after it can be trusted), or another value than these.
    """
    check_encoding(stream, file)
    text = _Text(stream, file)
    alone: str | None = None
    match text.sign():
        case "":
            return
        case "[":
            yield from _items(text)
        case "{":
            alone = None if (yield from _data(text)) else "object"
        case _:
            alone = kind_of(text.value()[0])
    if text.sign():
        raise text.broken(text.place, "Extra data", "one object a line is JSON Lines: name the file .jsonl")
    if alone:
        raise DataError(f"{file} holds one {alone}", allowed='a list of objects, or {"data": [a list of objects]}')


def _items(text: _Text) -> Iterator[Row]:
    text.step()
    if text.sign() == "]":
        text.step()
        return
    while True:
        text.sign()
        line = text.line
        value, fault = text.value()
        yield Row({} if fault else value, text.file, line, fault)
        sign = text.sign()
        if sign not in ("]", ","):
            raise text.broken(text.place, "Expecting ',' delimiter")
        text.step()
        if sign == "]":
            return


def _data(text: _Text) -> Iterator[Row]:
    """The rows under "data"; returns whether there was such a list."""
    found = False
    text.step()
    if text.sign() == "}":
        text.step()
        return found
    while True:
        if text.sign() != '"':
            raise text.broken(text.place, "Expecting property name enclosed in double quotes")
        key, _ = text.value()
        if text.sign() != ":":
            raise text.broken(text.place, "Expecting ':' delimiter")
        text.step()
        if key == "data" and text.sign() == "[":
            if found:
                raise text.broken(text.place, 'the key "data" stands twice')
            found = True
            yield from _items(text)
        else:
            text.sign()
            text.value()
        sign = text.sign()
        if sign not in ("}", ","):
            raise text.broken(text.place, "Expecting ',' delimiter")
        text.step()
        if sign == "}":
            return found


class _Text:
    """The text from `place` on; `line` is the line of `place`. What lies before it is forgotten at the next filling."""

    def __init__(self, stream: BufferedReader, file: str):
        self.file = file
        self.place = 0
        self.line = 1
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._characters_before = 0  # of the line on which the buffer begins
        self._whole = False
        self._has_bad_bytes = False

    def sign(self) -> str:
        """The next character that is no space, which then stands at `place`; "" at the end."""
        while True:
            found = SPACE.match(self._text, self.place)
            self._advance(found.end() if found else self.place)
            if self.place < len(self._text) or self._whole:
                return self._text[self.place : self.place + 1]
            self._fill()

    def step(self) -> None:
        """Go past the character that `sign` found."""
        self.place += 1

    def value(self) -> tuple[Any, RowFault | None]:
        """The value at `place` and what keeps it from being a row; goes past it.

        Raises:
            DataError: it is no JSON.
        """
        decode, repeated = DECODER.raw_decode, None
        while True:
            try:
                value, end = decode(self._text, self.place)
            except RowFault as fault:
                # once more, to find its end
                decode, repeated = PLAIN.raw_decode, fault
                continue
            except json.JSONDecodeError as error:
                near_end = error.pos >= len(self._text) - LONGEST_SIGN
                if self._whole or not (near_end or error.msg.startswith("Unterminated string")):
                    raise self.broken(error.pos, error.msg) from error
            except (ValueError, RecursionError) as error:
                raise DataError(f"{self.file}:{self.line}: JSON that cannot be read: {error}") from error
            else:
                # a number near the end of the buffer may go on: 1 and 1e- are the beginning of 1e-5
                if self._whole or end < len(self._text) - LONGEST_SIGN:
                    return self._past(value, end, repeated)
            self._fill()

    def broken(self, place: int, message: str, hint: str | None = None) -> DataError:
        """The error of a text that is no JSON from `place` on."""
        line = self.line + self._text.count("\n", self.place, place)
        start = self._text.rfind("\n", 0, place) + 1
        stop = self._text.find("\n", place)
        column = place - start + 1 + (0 if start else self._characters_before)
        source = self._text[start : stop if stop >= 0 else None]
        fault = broken_json(message, column, source, place - start, hint)
        return DataError(f"{self.file}:{line}: {fault.what}", next_step=hint)

    def _past(self, value: Any, end: int, fault: RowFault | None) -> tuple[Any, RowFault | None]:
        start = self.place
        bad = BAD_BYTE.search(self._text, start, end) if self._has_bad_bytes else None
        surrogates = ESCAPED_SURROGATE.search(self._text, start, end)
        self._advance(end)
        if bad is not None:
            return value, not_utf8(ord(bad.group()) - 0xDC00, self.file)
        return value, fault or check_row(value, surrogates is not None)

    def _advance(self, place: int) -> None:
        self.line += self._text.count("\n", self.place, place)
        self.place = place

    def _fill(self) -> None:
        left = len(self._text) - self.place
        # an item that does not fit doubles what is read, so that long items cost no more than twice their length
        data = self._stream.read(max(CHUNK_BYTES, left))
        self._whole = not data
        added = self._decoder.decode(data, final=self._whole)
        self._has_bad_bytes = self._has_bad_bytes or bool(not added.isascii() and BAD_BYTE.search(added))
        start = self._text.rfind("\n", 0, self.place) + 1
        self._characters_before = self.place - start + (0 if start else self._characters_before)
        self._text = self._text[self.place :] + added
        self.place = 0
