"""Tables of named parts. A new method, init, objective, task or optimiser is one file and one line in its table."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

from manylora.errors import UnknownName, nearest_names

Entry = TypeVar("Entry")


class Table(Generic[Entry]):
    """Names and where their objects live (`package.module:attribute`); an entry is imported when first asked for."""

    def __init__(self, kind: str, entries: Mapping[str, str]):
        self.kind = kind
        self._entries = dict(entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def check(self, name: str) -> str:
        """`name` itself, or an error that gives the names that exist; `package.module:NAME` is an entry of one's own.

        Raises:
            UnknownName: the table holds no such name, or there is nothing at such a place.
        """
        if _is_place(name):
            _imported(self.kind, name)
        elif name not in self._entries:
            raise UnknownName(
                f"no {self.kind} is called {name!r}",
                nearest=nearest_names(name, self._entries),
                allowed=", ".join(self._entries),
            )
        return name

    def get(self, name: str) -> Entry:
        """The object behind a name.

        Raises:
            UnknownName: the table holds no such name.
        """
        return _imported(self.kind, name if _is_place(name) else self._entries[self.check(name)])


def _is_place(name: str) -> bool:
    module, colon, attribute = name.partition(":")
    return bool(colon) and attribute.isidentifier() and all(part.isidentifier() for part in module.split("."))


def _imported(kind: str, place: str) -> Any:
    module, _, attribute = place.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # something that it imports is missing: its own fault
        raise UnknownName(
            f"no {kind} lies at {place!r}: Python finds no module {error.name!r}",
            next_step="put its folder on PYTHONPATH, or install its package",
        ) from error
    except AttributeError as error:
        raise UnknownName(f"no {kind} lies at {place!r}: the module has no {attribute!r}") from error
