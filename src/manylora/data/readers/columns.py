"""Columns under our names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from manylora.data.faults import RowFault
from manylora.data.rows import Row
from manylora.errors import DataError, nearest_names


def renamed(rows: Iterable[Row], columns: Mapping[str, str]) -> Iterator[Row]:
    """The rows with `columns` applied: {ours: theirs}; what a row held under our name before is gone.

    A row that lacks a column is a fault of that row. Where the first row lacks it, the name is most likely mistyped.

    Raises:
        DataError: the first row that could be read lacks a column.
    """
    if not columns:
        yield from rows
        return
    taken = set(columns.values())
    first = True
    for row in rows:
        if row.fault is not None:
            yield row
            continue
        fault = _lacking(row, columns)
        if fault is None:
            kept = {name: value for name, value in row.values.items() if name not in taken}
            yield Row(kept | {ours: row.values[theirs] for ours, theirs in columns.items()}, row.file, row.line)
        elif first:
            raise DataError(f"{row.where}: {fault.what}", nearest=fault.nearest, allowed=fault.allowed) from fault
        else:
            yield Row({}, row.file, row.line, fault)
        first = False


def _lacking(row: Row, columns: Mapping[str, str]) -> RowFault | None:
    for ours, theirs in columns.items():
        if theirs not in row.values:
            known = [str(name) for name in row.values]
            return RowFault(
                "no column",
                f"data.columns takes {ours!r} from {theirs!r}, a column that this row lacks",
                nearest=nearest_names(theirs, known),
                allowed=", ".join(known) or "(the row is empty)",
            )
    return None
