"""Faults of single rows, gathered so that one message names the first and counts the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from manylora.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from manylora.data.readers import Row


class RowFault(Exception):
    """What is wrong with one row; `kind` is the same for all rows with the same fault. Never leaves `manylora.data`."""

    def __init__(
        self,
        kind: str,
        what: str,
        *,
        nearest: Iterable[str] = (),
        allowed: str | None = None,
        next_step: str | None = None,
    ):
        super().__init__(what)
        self.kind = kind
        self.what = what
        self.nearest = tuple(nearest)
        self.allowed = allowed
        self.next_step = next_step


class Faults:
    """The faults met so far, in the order of the rows."""

    def __init__(self) -> None:
        self._found: list[tuple[Row, RowFault]] = []

    def add(self, row: Row, fault: RowFault) -> None:
        self._found.append((row, fault))

    def raise_first(self, num_rows: int) -> None:
        """Nothing where no row is at fault.

        Raises:
            DataError: the first fault, with file and line and the number of rows, out of `num_rows`, that share it.
        """
        if not self._found:
            return
        row, fault = self._found[0]
        alike = sum(other.kind == fault.kind for _, other in self._found)
        count = f" (the same in {alike} of {num_rows} rows)" if alike > 1 else ""
        raise DataError(
            f"{row.where}: {fault.what}{count}", nearest=fault.nearest, allowed=fault.allowed, next_step=fault.next_step
        ) from fault
