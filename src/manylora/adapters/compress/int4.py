"""`int4`: four bits a number in groups of 64, of factors that are balanced first where that lowers the error."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manylora.adapters.compress.balance import better
from manylora.adapters.compress.bits import from_bytes, num_bytes, to_bytes
from manylora.adapters.compress.scheme import Part
from manylora.errors import AdapterBroken
from manylora.ops.rounding import INT4 as GRID

_SHIFT = 8
"""Added to a code, so that its four bits hold no sign."""


class Int4:
    """Tensors of a factor: `codes` uint8 (R, ceil(n / 2)), `step` bfloat16 (R, groups)."""

    name = "int4"

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {"group": GRID.group}

    def encode(self, a: Tensor, b: Tensor, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        new_a, new_b = better(a, b, GRID)
        return _encode(new_a), _encode(new_b.t())

    def decode(self, part: Part, settings: Mapping[str, Any]) -> Tensor:
        if settings.get("group") != GRID.group:
            raise AdapterBroken(f"{part.name} has groups of {settings.get('group')!r}", allowed=str(GRID.group))
        stored = part.take("codes", torch.uint8, (part.rows, num_bytes(part.columns, 4)))
        groups = -(-part.columns // min(GRID.group or part.columns, part.columns))
        step = part.take("step", torch.bfloat16, (part.rows, groups))
        part.done()
        codes = from_bytes(stored, 4, part.columns).to(torch.int8) - _SHIFT
        if int(codes.min()) < -GRID.largest:
            raise AdapterBroken(f"{part.name} holds the code {int(codes.min())}", allowed="-7 to 7")
        return GRID.decode(codes, step)


def _encode(rows: Tensor) -> dict[str, Tensor]:
    codes, step = GRID.encode(rows)
    return {"codes": to_bytes(codes + _SHIFT, 4), "step": step.contiguous()}


INT4 = Int4()
