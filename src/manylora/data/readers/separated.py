"""Separated values with a header: .csv and .tsv, read strictly, every field as the text that stands there."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import partial
from io import BufferedReader
from typing import Any

from manylora.data.faults import RowFault
from manylora.data.readers.lines import lines_of
from manylora.data.rows import Row
from manylora.errors import DataError

LONGEST_FIELD = 1 << 30  # Python's own limit for a CSV field is 128 KiB, less than one long document


def separated(stream: BufferedReader, file: str, *, delimiter: str) -> Iterator[Row]:
    """A row per record; `line` is where the record starts. Blank lines are no records.

    Raises:
        DataError: a header that cannot be used, or quotes out of place: where the next record starts is not known then.
    """
    source = _Lines(stream, file)
    records = csv.reader(source, delimiter=delimiter, strict=True)
    header = _next(records, source, file)
    if header is None:
        return
    if source.fault is not None:
        raise DataError(f"{file}:{source.bad_line}: {source.fault.what}", next_step=source.fault.next_step)
    _check_header(header, file)
    while (fields := _next(records, source, file)) is not None:
        if source.fault is not None:
            yield Row({}, file, source.bad_line, source.fault)
        elif len(fields) == len(header):
            yield Row(dict(zip(header, fields, strict=True)), file, source.start)
        elif fields:
            fault = RowFault(
                "wrong number of fields",
                f"{len(fields)} fields where the header has {len(header)} ({', '.join(header)})",
                next_step="put fields that hold the separator or a line end in double quotes",
            )
            yield Row({}, file, source.start, fault)


commas = partial(separated, delimiter=",")
tabs = partial(separated, delimiter="\t")


class _Lines:
    """Lines for csv.reader; knows where the record that it is reading starts and what is wrong with its bytes."""

    def __init__(self, stream: BufferedReader, file: str):
        self._lines = lines_of(stream, file)
        self._number = 0
        self.start = 0
        self.begin()

    def begin(self) -> None:
        """The next line is the first of a record."""
        self.start = self._number + 1
        self.fault: RowFault | None = None
        self.bad_line = 0

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self._number, text, fault = next(self._lines)
        if fault is not None and self.fault is None:
            self.fault, self.bad_line = fault, self._number
        return text


def _next(records: Any, source: _Lines, file: str) -> list[str] | None:
    source.begin()
    # the limit is one for the whole process, so it is held only while a record is read
    previous_limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        return next(records, None)
    except csv.Error as error:
        raise DataError(
            f"{file}:{source.start}: broken CSV in the record that starts here: {error}",
            next_step='put a field that holds a double quote in double quotes and double it: "say ""hi"""',
        ) from error
    finally:
        csv.field_size_limit(previous_limit)


def _check_header(header: list[str], file: str) -> None:
    if not header:
        raise DataError(f"{file}:1: the first line is blank", allowed="a header that names the columns")
    if not all(name.strip() for name in header):
        raise DataError(f"{file}:1: a column of the header has no name ({', '.join(map(repr, header))})")
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{file}:1: the header names the column {repeated!r} twice")
