"""Parquet and Arrow files, a few rows at a time, with the values and types that they hold."""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from manylora.data.readers.labels import Labels
from manylora.data.readers.needed import needed
from manylora.data.rows import Row
from manylora.errors import DataError

BATCH_ROWS = 1000
BUFFER_BYTES = 1 << 20


def parquet(stream: BufferedReader, file: str) -> Iterator[Row]:
    """The rows of a parquet file; `line` is the number of the row, from 1."""
    with _seekable(stream) as source, _readable(file, "parquet"):
        from pyarrow.parquet import ParquetFile

        # without pre-buffering, a row group is read piece by piece and not as a whole
        opened = ParquetFile(source, buffer_size=BUFFER_BYTES, pre_buffer=False)
        yield from _rows(opened.iter_batches(batch_size=BATCH_ROWS), opened.schema_arrow, file)


def arrow(stream: BufferedReader, file: str) -> Iterator[Row]:
    """The rows of an Arrow file, of either form (IPC file or stream); `line` is the number of the row, from 1."""
    with _seekable(stream) as source, _readable(file, "arrow") as pyarrow:
        magic = source.read(6)
        source.seek(0)
        if magic == b"ARROW1":
            opened = pyarrow.ipc.open_file(source)
            batches = (opened.get_batch(place) for place in range(opened.num_record_batches))
        else:
            batches = opened = pyarrow.ipc.open_stream(source)
        yield from _rows(batches, opened.schema, file)


def num_parquet_rows(path: Path) -> int:
    """How many rows a parquet file says that it holds.

    Raises:
        DataError: it is no parquet file.
    """
    with _readable(str(path), "parquet"):
        from pyarrow.parquet import read_metadata

        return read_metadata(path).num_rows


def _rows(batches: Iterator[Any], schema: Any, file: str) -> Iterator[Row]:
    repeated = next((name for name in schema.names if schema.names.count(name) > 1), None)
    if repeated is not None:
        raise DataError(f"{file} names the column {repeated!r} twice")
    labels = Labels.of_schema(schema)
    line = 0
    for batch in batches:
        for start in range(0, batch.num_rows, BATCH_ROWS):
            for values in batch.slice(start, BATCH_ROWS).to_pylist():
                line += 1
                yield labels.row(values, file, line)


@contextmanager
def _seekable(stream: BufferedReader) -> Iterator[IO[bytes]]:
    # a packed file would be unpacked anew for every step backwards
    if isinstance(stream.raw, io.FileIO):
        yield stream
        return
    with tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(stream, unpacked, BUFFER_BYTES)
        unpacked.seek(0)
        yield unpacked


@contextmanager
def _readable(file: str, kind: str) -> Iterator[Any]:
    pyarrow = needed("pyarrow", file)
    try:
        yield pyarrow
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, EOFError) as error:
        raise DataError(f"{file} is not a whole {kind} file ({error})", next_step="fetch it again") from error
