"""Objects of Python whose items are rows: lists, data sets of torch, generators, data sets of `datasets`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

from manylora.data.faults import RowFault
from manylora.data.readers.columns import renamed
from manylora.data.rows import Row
from manylora.data.sources.folder import canonical
from manylora.data.sources.saved import Saved
from manylora.data.sources.source import Source
from manylora.errors import DataError, DataNotFound, nearest_names


def open_object(place: Any, split: str | None, columns: Mapping[str, str]) -> Source:
    """The rows of an object; `split` chooses from a dictionary of data sets.

    Raises:
        DataError: it has no items, or no splits where one is named. DataNotFound: no such split.
    """
    datasets = sys.modules.get("datasets")  # who holds one of its objects has imported it
    name = _name_of(place)
    if datasets is not None and isinstance(place, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        return open_object(_split_of(place, split or "train", name), None, columns)
    if split is not None:
        raise DataError(f"{name} has no splits; {split!r} is asked of it", next_step="pass the split itself")
    if datasets is not None and isinstance(place, datasets.Dataset):
        return Saved(name, place, columns, lambda: f"fingerprint:{place._fingerprint}")
    if datasets is not None and isinstance(place, datasets.IterableDataset):
        return Saved(name, place, columns, lambda: None)
    is_frame = hasattr(place, "to_dict") and hasattr(place, "columns")
    if is_frame or isinstance(place, Mapping) or not (hasattr(place, "__iter__") or hasattr(place, "__getitem__")):
        raise DataError(
            f"{name} where rows are expected",
            allowed="a path, hub:NAME, or a list, data set or iterable whose items are mappings",
            next_step="pass its rows: " + ('frame.to_dict("records")' if is_frame else "[{...}, {...}]"),
        )
    return Items(name, place, columns)


class Items:
    """The items of an object as rows; `line` is the number of the item, from 1."""

    def __init__(self, name: str, items: Any, columns: Mapping[str, str]):
        self.name = name
        self._items = items
        self.columns = columns
        self._was_read = False

    @property
    def num_rows(self) -> int | None:
        return len(self._items) if isinstance(self._items, Sized) else None

    def digest(self) -> None:
        """None: what an object will give cannot be known."""

    def rows(self) -> Iterator[Row]:
        return renamed(self._rows(), self.columns)

    def _rows(self) -> Iterator[Row]:
        if self._was_read and iter(self._items) is self._items:
            raise DataError(
                f"{self.name} can be read only once, and has been", next_step="pass a list or a data set instead"
            )
        self._was_read = True
        expected, line = self.num_rows, 0
        for line, item in enumerate(_items_of(self._items), start=1):
            if expected is not None and line > expected:
                raise self._other_number(expected, f"at least {line}")
            fault = None if isinstance(item, Mapping) else _no_mapping(item)
            yield Row({} if fault else item, self.name, line, fault)
        if expected is not None and line < expected:
            raise self._other_number(expected, str(line))
        if line == 0:
            raise DataError(f"{self.name} holds no rows", next_step="give data that holds at least one row")

    def _other_number(self, expected: int, given: str) -> DataError:
        return DataError(
            f"{self.name} says that it has {expected} items and gives {given}", next_step="correct its __len__"
        )


def _items_of(items: Any) -> Iterable[Any]:
    # a data set of torch with a length and __getitem__ need not raise IndexError past its end
    if hasattr(items, "__iter__") or not isinstance(items, Sized):
        return items
    return _by_place(items, len(items))


def _by_place(items: Any, count: int) -> Iterator[Any]:
    for place in range(count):
        try:
            item = items[place]
        except IndexError:
            return
        yield item


def _no_mapping(item: Any) -> RowFault:
    return RowFault(
        "no mapping",
        f"{_name_of(item)} where a row is expected",
        allowed='a mapping: {"column": value}',
        next_step="let the data set give a dictionary per item",
    )


def _name_of(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _split_of(splits: Mapping[Any, Any], wanted: str, name: str) -> Any:
    for known, dataset in splits.items():
        if known == wanted or canonical(str(known)) == canonical(wanted):
            return dataset
    known = [str(split) for split in splits]
    raise DataNotFound(
        f"{name} has no split {wanted!r}", nearest=nearest_names(wanted, known), allowed=", ".join(known)
    )
