"""Data sets of the library `datasets`: saved folders, the hub's, and those that a program made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from manylora.data.readers.columns import renamed
from manylora.data.readers.labels import Labels
from manylora.data.rows import Row
from manylora.errors import DataError

BATCH_ROWS = 1000


@dataclass(frozen=True)
class Saved:
    """The rows of a `datasets.Dataset` or `IterableDataset`; `line` is the number of the row, from 1."""

    name: str
    dataset: Any
    columns: Mapping[str, str]
    digest: Callable[[], str | None]

    @property
    def num_rows(self) -> int | None:
        return len(self.dataset) if hasattr(self.dataset, "num_rows") else None

    def rows(self) -> Iterator[Row]:
        return renamed(self._rows(), self.columns)

    def _rows(self) -> Iterator[Row]:
        labels = Labels(self.dataset.features)
        line = 0
        for values in self._values():
            line += 1
            yield labels.row(values, self.name, line)
        if line == 0:
            raise DataError(f"{self.name} holds no rows", next_step="give a data set that holds at least one row")

    def _values(self) -> Iterable[Mapping[str, Any]]:
        if self.num_rows is None:
            yield from self.dataset
            return
        form = self.dataset.format
        dataset = self.dataset
        if form["type"] not in (None, "custom"):
            # tensors and frames as the plain values that they were made of; a transform of the user's is kept
            shown = None if form["output_all_columns"] else form["columns"]
            dataset = dataset.with_format(None, columns=shown)
        for batch in dataset.iter(batch_size=BATCH_ROWS):
            names = list(batch)
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(names, values, strict=True))
