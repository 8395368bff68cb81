"""Rows of data files, each with the file and line that it came from: JSONL, JSON, CSV, TSV, text; plain, gz or xz."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from manylora.errors import DataError, DataNotFound, nearest_names

Paths = str | Path | Sequence[str | Path]
LONGEST_FIELD = 1 << 30  # Python's own limit for a CSV field is 128 KiB, less than one long document
SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True)
class Row:
    """One row as the file holds it: values by column, and where it stands (`line` counts from 1)."""

    values: Mapping[str, Any]
    file: str
    line: int

    @property
    def where(self) -> str:
        """`file:line`, as editors and compilers write it."""
        return f"{self.file}:{self.line}"


def read_rows(paths: Paths, *, columns: Mapping[str, str] | None = None) -> list[Row]:
    """The rows of one file or several, in order.

    The ending says how a file is read: .jsonl, .json (a list of objects, or {"data": [...]}), .csv and .tsv (with a
    header), .txt (one row {"text": ...} per paragraph; blank lines part them), each also as .gz or .xz.
    `columns` gives our name for a column of the file: {"prompt": "question"}.

    Raises:
        DataNotFound: no such file. DataError: an ending that is not known, an empty file, bytes that are not UTF-8,
            broken JSON or CSV (file, line and character), a column that is not there.
    """
    listed = [paths] if isinstance(paths, (str, Path)) else list(paths)
    if not listed:
        raise DataError("no data file is given", next_step="set data.train to a file or a list of files")
    rows = [row for path in listed for row in _read_file(Path(path))]
    return _rename(rows, columns) if columns else rows


def _read_file(path: Path) -> list[Row]:
    reader = _reader_of(path)
    _check_exists(path)
    text = _decode(path, _read_bytes(path))
    rows = [Row(values, str(path), line) for line, values in reader(text, path)]
    if not rows:
        raise DataError(f"{path} holds no rows", next_step="give a file that holds at least one row")
    return rows


def _reader_of(path: Path) -> Callable[[str, Path], Iterator[tuple[int, dict[str, Any]]]]:
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in (".gz", ".xz"):
        endings.pop()
    ending = endings[-1] if endings else ""
    if ending not in READERS:
        raise DataError(
            f"{path}: the ending {ending!r} does not say how to read it" if ending else f"{path} has no file ending",
            nearest=nearest_names(ending, READERS),
            allowed=f"{', '.join(READERS)}, each also with .gz or .xz",
        )
    return READERS[ending]


def _check_exists(path: Path) -> None:
    if path.is_file():
        return
    if path.is_dir():
        held = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        raise DataNotFound(f"{path} is a folder, not a file", nearest=held[:3], next_step="name the file in it")
    if not path.parent.is_dir():
        raise DataNotFound(f"no data file {path}: the folder {path.parent} does not exist")
    beside = [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    raise DataNotFound(
        f"no data file {path}",
        nearest=nearest_names(path.name, beside),
        next_step="relative paths of a configuration start at the configuration file",
    )


def _read_bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except PermissionError as error:
        raise DataError(f"{path} may not be read by this user ({error.strerror})") from error
    try:
        match path.suffix.lower():
            case ".gz":
                return gzip.decompress(data)
            case ".xz":
                return lzma.decompress(data)
            case _:
                return data
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(
            f"{path} is not a whole {path.suffix[1:]} file ({error})", next_step="fetch it again"
        ) from error


def _decode(path: Path, data: bytes) -> str:
    # Line ends are left alone: a CSV field may hold \r\n, and JSON counts its own characters.
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not valid UTF-8",
            allowed="text in UTF-8",
            next_step=f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {path.name} (with the encoding it was written in)",
        ) from error


def _jsonl(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    # Only \n ends a line: str.splitlines also cuts at U+2028 and others, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line or line.isspace():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise _broken_json(path, number, error.colno, error.msg, line) from error
        yield number, _as_object(value, path, number)


def _json(text: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if not text or text.isspace():
        return
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        source = text.split("\n")[error.lineno - 1]
        hint = "one object a line is JSON Lines: name the file .jsonl" if error.msg == "Extra data" else None
        raise _broken_json(path, error.lineno, error.colno, error.msg, source, hint) from error
    items = value.get("data") if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise DataError(
            f"{path} holds one {_kind(value)}", allowed='a list of objects, or {"data": [a list of objects]}'
        )
    for item, number in zip(items, _item_lines(text), strict=True):
        yield number, _as_object(item, path, number)


def _item_lines(text: str) -> Iterator[int]:
    """The line on which each item of the file's list begins; `text` has been parsed before, so it is whole."""
    decode = json.JSONDecoder().raw_decode

    def after_space(place: int) -> int:
        found = SPACE.match(text, place)
        return found.end() if found else place

    place = after_space(0)
    if text[place] == "{":
        starts = {}
        while text[place] != "}":
            key, place = decode(text, after_space(place + 1))
            starts[key] = after_space(after_space(place) + 1)
            place = after_space(decode(text, starts[key])[1])
        place = starts["data"]
    line, counted = 1, 0
    while (place := after_space(place + 1)) < len(text) and text[place] != "]":
        line, counted = line + text.count("\n", counted, place), place
        yield line
        place = after_space(decode(text, place)[1])
        if text[place] == "]":
            return


def _broken_json(path: Path, line: int, column: int, message: str, source: str, hint: str | None = None) -> DataError:
    around = source[max(0, column - 21) : column + 19]
    return DataError(f"{path}:{line}: broken JSON at character {column}: {message} (near {around!r})", next_step=hint)


def _as_object(value: Any, path: Path, line: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{path}:{line}: a {_kind(value)} where a row is expected", allowed='an object: {"column": value}'
        )
    return value


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _separated(text: str, path: Path, *, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    previous_limit = csv.field_size_limit(LONGEST_FIELD)
    # newline="" keeps line ends inside quoted fields as they are
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(lines, None)
        if header is None:
            return
        _check_header(header, path)
        start = lines.line_num + 1
        for fields in lines:
            if fields and len(fields) != len(header):
                raise DataError(
                    f"{path}:{start}: {len(fields)} fields where the header has {len(header)} ({', '.join(header)})",
                    next_step="put fields that hold the separator or a line end in double quotes",
                )
            if fields:
                yield start, dict(zip(header, fields, strict=True))
            start = lines.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{lines.line_num}: broken CSV: {error}") from error
    finally:
        csv.field_size_limit(previous_limit)


def _check_header(header: list[str], path: Path) -> None:
    if not all(name.strip() for name in header):
        raise DataError(f"{path}:1: a column of the header has no name ({', '.join(map(repr, header))})")
    repeated = next((name for name in header if header.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{path}:1: the header names the column {repeated!r} twice")


def _text(text: str, _path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    paragraph: list[str] = []
    start = 1
    for number, line in enumerate([*text.replace("\r\n", "\n").split("\n"), ""], start=1):
        if line.strip():
            start = start if paragraph else number
            paragraph.append(line)
        elif paragraph:
            yield start, {"text": "\n".join(paragraph)}
            paragraph = []


READERS: dict[str, Callable[[str, Path], Iterator[tuple[int, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": partial(_separated, delimiter=","),
    ".tsv": partial(_separated, delimiter="\t"),
    ".txt": _text,
}
"""How each file ending is read: (text, path) -> (line, values) of every row."""


def _rename(rows: list[Row], columns: Mapping[str, str]) -> list[Row]:
    for ours, theirs in columns.items():
        lacking = [row for row in rows if theirs not in row.values]
        if lacking:
            known = list(lacking[0].values)
            raise DataError(
                f"{lacking[0].where}: data.columns takes {ours!r} from {theirs!r}, a column that {len(lacking)} of "
                f"{len(rows)} rows lack",
                nearest=nearest_names(theirs, known),
                allowed=", ".join(known) or "(the row is empty)",
            )
    taken = set(columns.values())
    return [
        Row(
            {name: value for name, value in row.values.items() if name not in taken}
            | {ours: row.values[theirs] for ours, theirs in columns.items()},
            row.file,
            row.line,
        )
        for row in rows
    ]
