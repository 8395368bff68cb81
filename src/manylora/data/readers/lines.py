"""Numbered lines of a text file, decoded one by one so that bytes that are no UTF-8 spoil only their own."""

from __future__ import annotations

from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from manylora.data.faults import RowFault
from manylora.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
WIDE = {b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
"""The marks with which files in other Unicode encodings begin; the longer ones first."""


def lines_of(stream: BufferedReader, file: str) -> Iterator[tuple[int, str, RowFault | None]]:
    r"""(number, text with its line end, fault) of every line; bytes that are no UTF-8 stand as lone surrogates.

    Only \n ends a line: str.splitlines also cuts at U+2028 and others, which JSON strings may hold.

    Raises:
        DataError: the file is UTF-16 or UTF-32, or \r alone ends its lines.
    """
    check_encoding(stream, file)
    head = stream.peek()
    if b"\r" in head.rstrip() and b"\n" not in head:
        raise DataError(
            f"{file}:1: the lines end with carriage returns alone, as on old Macs",
            allowed=r"lines that end with \n or \r\n",
            next_step=rf"convert it: tr '\r' '\n' < {Path(file).name} > converted-{Path(file).name}",
        )
    for number, data in enumerate(stream, start=1):
        fault = None
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            text = data.decode(errors="surrogateescape")
            fault = not_utf8(data[error.start], file)
        yield number, text, fault


def check_encoding(stream: BufferedReader, file: str) -> None:
    """Step over the byte order mark of UTF-8.

    Raises:
        DataError: the file begins as UTF-16 or UTF-32 do.
    """
    head = stream.peek(8)
    if head.startswith(BYTE_ORDER_MARK):
        stream.read(len(BYTE_ORDER_MARK))
        return
    encoding = next((name for mark, name in WIDE.items() if head.startswith(mark)), None)
    # without a mark: Latin letters in UTF-16 have a zero in every second byte
    if encoding is None and len(head) >= 8 and not (any(head[0:8:2]) and any(head[1:8:2])) and any(head[:8]):
        encoding = "UTF-16"
    if encoding is not None:
        name = Path(file).name
        raise DataError(
            f"{file} is {encoding}",
            allowed="text in UTF-8",
            next_step=f"convert it: iconv -f {encoding} -t UTF-8 {name} > utf8-{name}",
        )


def not_utf8(byte: int, file: str) -> RowFault:
    """The fault of a line that holds `byte` where UTF-8 allows none such."""
    return RowFault(
        "not UTF-8",
        f"byte 0x{byte:02x} is not valid UTF-8",
        allowed="text in UTF-8",
        next_step=f"convert it: iconv -f WINDOWS-1252 -t UTF-8 {Path(file).name} (with the encoding it was written in)",
    )
