"""The tensors that a packed weight consists of, by name, whatever its format; and the same weight of others."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from manylora.types import Packed


def held_tensors(packed: Packed) -> dict[str, Tensor]:
    """What it holds: `codes`, and scales under names such as `nested_absmax`. Tables that a device shares are none."""
    return dict(_walk(packed, ""))


def with_tensors(packed: Packed, tensors: Mapping[str, Tensor]) -> Packed:
    """The same weight, which holds these tensors under the names of `held_tensors`."""
    changed: Packed = _rebuilt(packed, "", tensors)
    return changed


def _walk(value: Any, prefix: str) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, part in _parts(value):
        if isinstance(part, Tensor):
            found.append((prefix + name, part))
        else:
            found += _walk(part, f"{prefix}{name}_")
    return found


def _rebuilt(value: Any, prefix: str, tensors: Mapping[str, Tensor]) -> Any:
    changed = {
        name: tensors[prefix + name] if isinstance(part, Tensor) else _rebuilt(part, f"{prefix}{name}_", tensors)
        for name, part in _parts(value)
    }
    return dataclasses.replace(value, **changed)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """The fields that are tensors, or hold some."""
    fields = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    return [
        (name, part)
        for name, part in fields
        if isinstance(part, Tensor) or (dataclasses.is_dataclass(part) and not isinstance(part, type))
    ]
