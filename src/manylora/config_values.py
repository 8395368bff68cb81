"""What a configuration's values may be: numbers however they are written, names that a table holds, lists of one."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from types import MappingProxyType
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from manylora.settings import LEAST, dtype_of_name

# Where the names that a key accepts are kept: (module, table). Imported only when such a key is checked.
TABLES = MappingProxyType(
    {
        "task": ("manylora.tasks", "TASKS"),
        "packing": ("manylora.quant", "PACKINGS"),
        "format": ("manylora.data.formats", "FORMATS"),
        "method": ("manylora.methods", "METHODS"),
        "init": ("manylora.methods.inits", "INITS"),
        "schedule": ("manylora.training.schedule", "SCHEDULES"),
        "objective": ("manylora.objectives", "OBJECTIVES"),
        "objective with settings": ("manylora.objectives", "SETTINGS"),
        "optimizer": ("manylora.training.optim", "OPTIMIZERS"),
        "track": ("manylora.runs.trackers", "TRACKERS"),
        "search": ("manylora.sweeps.searches", "SEARCHES"),
        "stopping rule": ("manylora.sweeps.stopping", "RULES"),
        "engine": ("manylora.sweeps.engines", "ENGINES"),
    }
)


def dtype_name(value: Any) -> Any:
    """The name of a dtype of torch, as people pass it in Python or type it; anything else as it is."""
    return dtype_of_name(str(value)) if type(value).__module__ == "torch" or isinstance(value, str) else value


def table_of(kind: str) -> Any:
    """The table of a kind, imported now."""
    import importlib

    module, table = TABLES[kind]
    return getattr(importlib.import_module(module), table)


def in_table(kind: str, *, besides: Sequence[str] = ()) -> AfterValidator:
    """A check that a name is in the table of its kind, or one of `besides`."""
    return AfterValidator(lambda name: name if name in besides else table_of(kind).check(name))


def whole(value: Any) -> Any:
    """Whole numbers however they are written (8, 8.0, 1e3), and not true or false."""
    if isinstance(value, bool):
        raise ValueError("a whole number")  # noqa: TRY004 - pydantic collects ValueError alone
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number(value: Any) -> Any:
    """Finite numbers, also those that YAML 1.1 readers leave as text (1e-3), and not true or false."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError("a number") from None
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError("a finite number")
    return value


def rate_or_auto(value: Any) -> Any:
    rate = value if value == "auto" else number(value)
    if rate != "auto" and (not isinstance(rate, int | float) or rate <= 0):
        raise ValueError("above 0, or auto")
    if rate != "auto" and rate < LEAST:
        raise ValueError(f"at least {LEAST:g}, or auto")
    return rate


def as_temperature(value: Any) -> Any:
    """0, or a number by which logits can be divided."""
    found = number(value)
    if not isinstance(found, int | float) or (found != 0 and found < LEAST):
        raise ValueError(f"0 (greedy), or at least {LEAST:g}")
    return found


def folder_name(value: Any) -> Any:
    """A path that says something: an empty one would be the folder where one stands."""
    if isinstance(value, str) and not value.strip():
        raise ValueError("the name of a folder")
    return value


def count_or_auto(value: Any) -> Any:
    count = value if value == "auto" else whole(value)
    if count != "auto" and (not isinstance(count, int) or count < 1):
        raise ValueError("at least 1, or auto")
    return count


def fold_part(text: str) -> str:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or not 1 <= int(found[1]) <= int(found[2]) or int(found[2]) < 2:
        raise ValueError("PART/PARTS, such as 1/5: the first of five parts is held out")
    return text


def device_name(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise ValueError("auto, cpu, cuda, cuda:1 or mps")
    return name


def several(value: Any) -> Any:
    """One name, names with commas between them, or a list, as a list; a regular expression keeps its commas."""
    if isinstance(value, str):
        return [value] if value.startswith("re:") else [part.strip() for part in value.split(",") if part.strip()]
    return value


def alone(value: Any) -> Any:
    return value if isinstance(value, list | tuple) or value is None else [value]


def or_none(value: Any) -> Any:
    return () if value is None else value


Whole = Annotated[int, BeforeValidator(whole)]
Number = Annotated[float, BeforeValidator(number)]
Names = Annotated[tuple[str, ...], BeforeValidator(several)]
