"""Class labels under their names: files of `datasets` hold a number and keep its name in the schema."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from manylora.data.faults import RowFault
from manylora.data.rows import Row

Naming = Callable[[Any], Any]


class Labels:
    """Turns the numbers of class-label columns into names, also inside lists and objects."""

    def __init__(self, features: Mapping[str, Any] | None):
        namings = {name: _naming(feature) for name, feature in (features or {}).items()}
        self._namings = {name: naming for name, naming in namings.items() if naming is not None}

    @classmethod
    def of_schema(cls, schema: Any) -> Labels:
        """The labels that the schema of an Arrow or parquet file names."""
        if b"ClassLabel" not in (schema.metadata or {}).get(b"huggingface", b""):
            return cls(None)
        from datasets import Features

        return cls(Features.from_arrow_schema(schema))

    def row(self, values: Mapping[str, Any], file: str, line: int) -> Row:
        """The row of some values; a label without a name is its fault."""
        if not self._namings:
            return Row(values, file, line)
        named = dict(values)
        for column, naming in self._namings.items():
            if column in named:
                try:
                    named[column] = naming(named[column])
                except RowFault as fault:
                    what = f"column {column!r}: {fault.what}"
                    return Row({}, file, line, RowFault(fault.kind, what, allowed=fault.allowed))
        return Row(named, file, line)


def _naming(feature: Any) -> Naming | None:
    """How values of a feature are named; None: there is no class label in it."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return _name_of(list(feature.names))
    if isinstance(feature, Mapping):
        inner = {name: _naming(part) for name, part in feature.items()}
        return _in_object({name: naming for name, naming in inner.items() if naming is not None})
    item = _naming(feature.feature) if hasattr(feature, "feature") else None
    return None if item is None else _in_list(item)


def _name_of(names: list[str]) -> Naming:
    def naming(value: Any) -> Any:
        # a transform of the data set may have named it already
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if not 0 <= value < len(names):
            # -1 marks the rows of a test set whose labels are not told
            raise RowFault("label without a name", f"the label {value} has no name", allowed=", ".join(names))
        return names[value]

    return naming


def _in_list(item: Naming) -> Naming:
    return lambda values: [item(value) for value in values] if isinstance(values, list) else values


def _in_object(parts: dict[str, Naming]) -> Naming | None:
    if not parts:
        return None
    return lambda value: (
        {name: parts[name](part) if name in parts else part for name, part in value.items()}
        if isinstance(value, Mapping)
        else value
    )
