"""A row: what a file or an object holds before any format has looked at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manylora.data.faults import RowFault


@dataclass(frozen=True, slots=True)
class Row:
    """One row as its source holds it: values by column, and where it stands (`line` counts from 1).

    A line that could not be read (broken JSON, bytes that are not UTF-8) is a row too: it has no values, and `fault`
    says what is wrong, so that it is counted with the other faults and the rows after it are still read.
    """

    values: Mapping[str, Any]
    file: str
    line: int
    fault: RowFault | None = None

    @property
    def where(self) -> str:
        """`file:line`, as editors and compilers write it."""
        return f"{self.file}:{self.line}"
