"""One file: its ending says how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BufferedReader
from pathlib import Path

from manylora.data.readers.opened import PACKED, member_of, opened
from manylora.data.rows import Row
from manylora.errors import DataError, DataNotFound, nearest_names
from manylora.table import Table

Reader = Callable[[BufferedReader, str], Iterator[Row]]
"""(the file's unpacked bytes, its name) -> its rows."""

ENDINGS: Table[Reader] = Table(
    "file ending",
    {
        ".jsonl": "manylora.data.readers.json_lines:json_lines",
        ".ndjson": "manylora.data.readers.json_lines:json_lines",
        ".json": "manylora.data.readers.json_list:json_list",
        ".csv": "manylora.data.readers.separated:commas",
        ".tsv": "manylora.data.readers.separated:tabs",
        ".txt": "manylora.data.readers.paragraphs:paragraphs",
        ".conll": "manylora.data.readers.conll:sentences",
        ".bio": "manylora.data.readers.conll:sentences",
        ".iob": "manylora.data.readers.conll:sentences",
        ".parquet": "manylora.data.readers.columnar:parquet",
        ".arrow": "manylora.data.readers.columnar:arrow",
        ".feather": "manylora.data.readers.columnar:arrow",
    },
)


def read_file(path: Path) -> Iterator[Row]:
    """The rows of a file as they are read; those that cannot be read carry a fault.

    Raises:
        DataNotFound: no such file. DataError: an ending that is not known, no rows, or damage that the rest of the file
            cannot be read past (file and line).
    """
    check_exists(path)
    reader = ENDINGS.get(ending_of(path))
    row = None
    with opened(path) as stream:
        for row in reader(stream, str(path)):
            yield row
    if row is None:
        raise DataError(f"{path} holds no rows", next_step="give a file that holds at least one row")


def ending_of(path: Path) -> str:
    """The ending, in lower case, that says how the rows of a file are read; that of a zip's file inside.

    Raises:
        DataError: no ending, or one that is not known. DataNotFound: the file is a zip and not there.
    """
    ending = named_ending(path.name)
    if path.suffix.lower() == ".zip":
        check_exists(path)
        inside = named_ending(member_of(path).filename)
        ending = inside if inside in ENDINGS else ending
    if ending in ENDINGS:
        return ending
    what = f"the ending {ending!r} does not say how to read it"
    if not ending:
        packed = path.suffix.lower()
        what = f"there is no file ending before {packed}" if packed in PACKED else "it has no file ending"
    raise DataError(
        f"{path}: {what}",
        nearest=nearest_names(ending, ENDINGS),
        allowed=f"{', '.join(ENDINGS)}, each also with {', '.join(PACKED)}",
    )


def named_ending(name: str) -> str:
    """The ending of a file's name, in lower case, without that of its compression; "" where there is none."""
    endings = [ending.lower() for ending in Path(name).suffixes]
    if endings and endings[-1] in PACKED:
        endings.pop()
    return endings[-1] if endings else ""


def check_exists(path: Path) -> None:
    """Nothing where `path` is a file.

    Raises:
        DataNotFound: there is none, or it is a folder.
    """
    if path.is_file():
        return
    if path.is_dir():
        held = sorted(entry.name for entry in path.iterdir() if entry.is_file())
        raise DataNotFound(f"{path} is a folder, not a file", nearest=held[:3], next_step="name the file in it")
    if not path.parent.is_dir():
        raise DataNotFound(f"no data file {path}: the folder {path.parent} does not exist")
    beside = [entry.name for entry in path.parent.iterdir()]
    raise DataNotFound(
        f"no data file {path}",
        nearest=nearest_names(path.name, beside),
        next_step="relative paths of a configuration start at the configuration file",
    )
