"""Rows of data files, one at a time, with exact values, file and line; a bad line is one bad row, not the file's end.

Text forms (JSON, CSV, CoNLL, plain text) are parsed here and not by the loaders of `datasets`, which change values in
silence: its JSON reader turns "2020-01-01 00:00:00" into a datetime and gives every row the keys of all others, its CSV
reader makes None of "NA", "null" and "" and 1.0 of "001", and either loses the whole file to one broken line and cannot
name it. Forms that carry types of their own (parquet, arrow) are read by pyarrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from manylora.data.faults import Faults
from manylora.data.readers.columns import renamed
from manylora.data.readers.file import check_exists, read_file
from manylora.data.rows import Row
from manylora.errors import DataError

Paths = str | Path | Sequence[str | Path]


def read_rows(paths: Paths, *, columns: Mapping[str, str] | None = None) -> list[Row]:
    """All rows of one file or several, in order, in memory; `manylora.data.sources` streams them instead.

    The ending says how a file is read: .jsonl and .ndjson, .json (a list of objects, or {"data": [...]}), .csv and .tsv
    (with a header), .txt (one row {"text": ...} per paragraph; blank lines part them), .conll, .bio and .iob (one row
    {"tokens": [...], "tags": [...]} per sentence), .parquet, .arrow and .feather, each also as .gz, .xz, .bz2, .zst or
    .zip. `columns` gives our name for a column of the file: {"prompt": "question"}.

    Raises:
        DataNotFound: no such file. DataError: an ending that is not known, an empty or damaged file, and the first row
            that cannot be read, with file and line.
    """
    listed = [Path(path) for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    if not listed:
        raise DataError("no data file is given", next_step="set data.train to a file or a list of files")
    for path in listed:
        check_exists(path)
    rows = list(renamed((row for path in listed for row in read_file(path)), columns or {}))
    faults = Faults()
    for row in rows:
        if row.fault is not None:
            faults.add(row, row.fault)
    faults.raise_first(len(rows))
    return rows
