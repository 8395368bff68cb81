"""Settings that a part of the house declares for itself, each once: its default, what is allowed, and what it is.

They are the fields of a frozen dataclass, made by `number`, `flag` and `word_or_path`. A configuration is checked
against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from manylora.errors import ConfigError

LEAST = 1e-20
"""Smaller positive rates and temperatures are mistakes that only the end of a run would show."""
SHORT_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "fp64": "float64"}
"""What people type for a dtype."""


def dtype_of_name(name: str) -> str:
    """A dtype's own name, of how people type it or torch prints it; another name as it is."""
    name = name.removeprefix("torch.")
    return SHORT_DTYPES.get(name, name)


@dataclass(frozen=True, slots=True)
class Setting:
    """One line that says what a setting is, what is allowed, how a value is read, and what other tools call it.

    `read` gives the value as it is used, or raises ValueError or TypeError. `is_path`: relative paths are relative to
    the file that they are written in.
    """

    description: str
    allowed: str
    read: Callable[[Any], Any]
    elsewhere: tuple[str, ...] = ()
    is_path: bool = False


def number(
    default: float | None,
    description: str,
    *,
    at_least: float = -math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    elsewhere: tuple[str, ...] = (),
) -> Any:
    """A field that holds a number; null is allowed where it is the default."""
    bounds = [
        (at_least, f"at least {at_least:g}"),
        (above, f"above {above:g}"),
        (below, f"below {below:g}"),
        (at_most, f"at most {at_most:g}"),
    ]
    allowed = " and ".join(words for bound, words in bounds if math.isfinite(bound)) or "a finite number"
    allowed += ", or null" if default is None else ""

    def read(value: Any) -> float | None:
        if value is None and default is None:
            return None
        if value is None or isinstance(value, bool):
            raise TypeError
        found = float(value)  # of text too: YAML 1.1 readers leave 1e-3 as it is written
        if not (math.isfinite(found) and at_least <= found < below and above < found <= at_most):
            raise ValueError
        return found

    return field(default=default, metadata={"setting": Setting(description, allowed, read, elsewhere)})


def flag(default: bool, description: str, *, elsewhere: tuple[str, ...] = ()) -> Any:
    """A field that holds true or false."""

    def read(value: Any) -> bool:
        if not isinstance(value, bool):
            raise TypeError
        return value

    return field(default=default, metadata={"setting": Setting(description, "true or false", read, elsewhere)})


def word_or_path(default: str, words: tuple[str, ...], description: str, *, elsewhere: tuple[str, ...] = ()) -> Any:
    """A field that holds one of some words, or a path; the words go before files of the same names."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise TypeError
        return value

    allowed = f"{', '.join(words)}, or a path"
    return field(default=default, metadata={"setting": Setting(description, allowed, read, elsewhere, is_path=True)})


@dataclass(frozen=True, slots=True)
class NoSettings:
    """The settings of a part that has none of its own."""


def declared(settings: type) -> dict[str, Setting]:
    """What a dataclass of settings declares, by name."""
    return {one.name: one.metadata["setting"] for one in fields(settings)}


def read_settings(settings: type, given: Mapping[str, Any], where: str) -> Any:
    """A dataclass of settings from those that are given, each of them declared, and the defaults of the others.

    Raises:
        ConfigError: a value that is not allowed, by its key under `where`.
    """
    known, values = declared(settings), {}
    for key, value in given.items():
        try:
            values[key] = known[key].read(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"{where}.{key} is {value!r}", allowed=known[key].allowed) from None
    return settings(**values)
