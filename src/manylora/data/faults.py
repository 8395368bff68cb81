"""Faults of single rows, counted by kind: the first of each kind is kept, so that a message can name it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manylora.errors import DataError

if TYPE_CHECKING:
    from manylora.data.rows import Row


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


@dataclass(frozen=True, slots=True)
class Reason:
    """Why rows were not used: the kind of fault, how many rows have it, and the first of them."""

    kind: str
    count: int
    where: str
    what: str

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, "count": self.count, "where": self.where, "what": self.what}


class Faults:
    """The faults met so far, by kind, in the order in which the kinds were met."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[Row, RowFault]] = {}
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(self._counts.values())

    def add(self, row: Row, fault: RowFault) -> None:
        """Count a row's fault."""
        self._first.setdefault(fault.kind, (row, fault))
        self._counts[fault.kind] = self._counts.get(fault.kind, 0) + 1

    def reasons(self) -> list[Reason]:
        """Each kind of fault, the most frequent first."""
        found = [Reason(kind, self._counts[kind], row.where, fault.what) for kind, (row, fault) in self._first.items()]
        return sorted(found, key=lambda reason: -reason.count)

    def raise_first(self, num_rows: int, *, next_step: str | None = None) -> None:
        """Nothing where no row is at fault.

        Raises:
            DataError: the first fault, with file and line and the number of rows, out of `num_rows`, that share it.
        """
        if not self._first:
            return
        row, fault = next(iter(self._first.values()))
        alike, others = self._counts[fault.kind], len(self) - self._counts[fault.kind]
        count = f" (the same in {alike} of {num_rows} rows)" if alike > 1 else ""
        count += f" ({others} of {num_rows} rows have other faults)" if others else ""
        steps = [step for step in (fault.next_step, next_step) if step]
        raise DataError(
            f"{row.where}: {fault.what}{count}",
            nearest=fault.nearest,
            allowed=fault.allowed,
            next_step="; or ".join(steps) or None,
        ) from fault


def reason_lines(reasons: Sequence[Reason], num_rows: int) -> list[str]:
    """The table of reasons, a line each: how many rows, why, and the first of them."""
    if not reasons:
        return []
    skipped = sum(reason.count for reason in reasons)
    width = len(str(max(reason.count for reason in reasons)))
    lines = [f"{skipped} of {num_rows} rows are skipped:"]
    return lines + [f"  {one.count:>{width}}  {one.kind}: {one.what} (first {one.where})" for one in reasons]
