"""What every source of rows can be asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from manylora.data.rows import Row


class Source(Protocol):
    """Rows from one place, read as they are asked for."""

    @property
    def name(self) -> str:
        """The place, for the log and messages: a path, "hub:owner/name [train]", "a TensorDataset"."""
        ...

    @property
    def columns(self) -> Mapping[str, str]:
        """Our name for a column of the place, by ours: {"prompt": "question"}."""
        ...

    @property
    def num_rows(self) -> int | None:
        """How many rows `rows` will give, where that is known before reading."""
        ...

    def rows(self) -> Iterator[Row]:
        """The rows from the first on, each time that it is called; a row that cannot be read carries a fault.

        Raises:
            DataError: damage that nothing can be read past, no rows at all, another number of rows than was said.
        """
        ...

    def digest(self) -> str | None:
        """A text that differs where the content differs: "sha256:..." of files, "fingerprint:..." of what `datasets`
        holds. None: it cannot be known.
        """
        ...
