"""`int8`: eight bits a number, with one scale for each row of A and each column of B.

The scales run along the components of the product, B A = sum_k b_k a_k: each is s_k t_k times a product of whole
numbers, so that they can be folded into either factor, or into one vector of R numbers between the two.

Factors that lose less when they are balanced are. Of a product of Gaussian factors, 256 x 8 and 8 x 256, 1 % is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from manylora.adapters.compress.balance import better
from manylora.adapters.compress.scheme import Part
from manylora.errors import AdapterBroken
from manylora.ops.rounding import INT8 as GRID


class Int8:
    """Tensors of a factor: `codes` int8 (R, n), `step` bfloat16 (R, 1)."""

    name = "int8"

    def settings(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return {}

    def encode(self, a: Tensor, b: Tensor, options: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        new_a, new_b = better(a, b, GRID)
        return _encode(new_a), _encode(new_b.t())

    def decode(self, part: Part, settings: Mapping[str, Any]) -> Tensor:
        codes = part.take("codes", torch.int8, (part.rows, part.columns))
        step = part.take("step", torch.bfloat16, (part.rows, 1))
        part.done()
        if int(codes.min()) < -GRID.largest:
            raise AdapterBroken(f"{part.name} holds the code {int(codes.min())}", allowed="-127 to 127")
        return GRID.decode(codes, step)


def _encode(rows: Tensor) -> dict[str, Tensor]:
    codes, step = GRID.encode(rows)
    return {"codes": codes.contiguous(), "step": step.contiguous()}


INT8 = Int8()
