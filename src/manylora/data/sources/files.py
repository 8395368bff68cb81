"""Files as a source."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from manylora.data.readers.columns import renamed
from manylora.data.readers.file import check_exists, ending_of, read_file
from manylora.data.rows import Row
from manylora.files import file_digest


@dataclass(frozen=True)
class Files:
    """The rows of files, one file after the other."""

    name: str
    paths: tuple[Path, ...]
    columns: Mapping[str, str]

    @classmethod
    def of(cls, paths: Sequence[Path], columns: Mapping[str, str], *, name: str) -> Files:
        """A source of files that are there and whose endings are known.

        Raises:
            DataNotFound: a file is not there. DataError: an ending is not known.
        """
        for path in paths:
            check_exists(path)
            ending_of(path)
        return cls(name, tuple(paths), columns)

    @property
    def num_rows(self) -> int | None:
        """The sum of what parquet files say; None where one of the files is of another form."""
        if any(path.suffix.lower() != ".parquet" for path in self.paths):
            return None
        from manylora.data.readers.columnar import num_parquet_rows

        return sum(num_parquet_rows(path) for path in self.paths)

    def rows(self) -> Iterator[Row]:
        return renamed((row for path in self.paths for row in read_file(path)), self.columns)

    def digest(self) -> str:
        """SHA-256 of the file's bytes; of several, that of their digests in order."""
        return "sha256:" + digest_of(self.paths)


def digest_of(paths: Sequence[Path]) -> str:
    """SHA-256 of one file's bytes, or of the digests of several, as hexadecimal digits."""
    digests = [file_digest(path) for path in paths]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()
