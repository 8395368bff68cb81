"""Tables of named parts. A new method, init, objective, task or optimiser is one file and one line in its table."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Generic, TypeVar

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
        """`name` itself, or an error that gives the names that exist.

        Raises:
            UnknownName: the table holds no such name.
        """
        if name not in self._entries:
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
        module, _, attribute = self._entries[self.check(name)].partition(":")
        return getattr(importlib.import_module(module), attribute)
