"""`int4`: four bits a weight in evenly spaced values, with a scale per group of neighbours in a row.

Semantics: s = 15 / (max - min); q = round(s (x - zero)), half to even; x^ = q / s + zero, with zero = min of the group.
With `symmetric`: s = 7 / max |x|; x^ = q / s, q in -7..7. s is the inverse of the step.

The zero point is a float32 number, not one of sixteen codes: a group that lies far from 0 keeps its whole range, and a
group of equal values comes back exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from manylora.quant.checks import (
    Stored,
    check_dense_dtype,
    check_magnitude,
    check_options,
    checked_flag,
    checked_size,
    checked_weight,
)
from manylora.quant.groups import grouped, num_groups, row_chunks
from manylora.quant.int8 import inverse_of

BLOCK = 128
"""Two float32 numbers a group make 4.5 bits a weight, as nf4 with plain scales at block 64; 64 would take 5."""
SYMMETRIC_SHIFT = 8


@dataclass(frozen=True, slots=True, eq=False)
class Int4:
    """A (O, I) weight in four bits each.

    `codes` is uint8 (O, ceil(I / 2)), the even column in the high nibble; `inverse_step` and `zero` are float32
    (O, ceil(I / block)). A symmetric weight has no `zero`; its nibbles are q + 8.
    """

    shape: tuple[int, int]
    block: int
    codes: Tensor
    inverse_step: Tensor
    zero: Tensor | None

    @property
    def format(self) -> str:
        return "int4"

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, (O, I), new each time: computed in float32, rounded once to `dtype`.

        Raises:
            ConfigError: a dtype that is not floating, or of eight bits.
        """
        check_dense_dtype(dtype)
        rows, columns = self.shape
        out = torch.empty(rows, columns, dtype=dtype, device=self.codes.device)
        pairs = _pairs(self.codes.device, 0 if self.zero is not None else SYMMETRIC_SHIFT)
        for chunk in row_chunks(rows, columns):
            flat = pairs.index_select(0, self.codes[chunk].reshape(-1).to(torch.int32))
            values = flat.view(torch.float32).view(-1, 2 * self.codes.shape[1])[:, :columns]
            for group, places in grouped(values, self.block):
                group.div_(self.inverse_step[chunk, places].unsqueeze(2))
                if self.zero is not None:
                    group.add_(self.zero[chunk, places].unsqueeze(2))
            out[chunk] = values
        return out

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"codes": self.codes, "inverse_step": self.inverse_step}
        return tensors if self.zero is None else {**tensors, "zero": self.zero}

    def settings(self) -> dict[str, Any]:
        return {
            "format": "int4",
            "shape": list(self.shape),
            "block": self.block,
            "symmetric": self.zero is None,
        }

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors().values())

    def bits(self) -> float:
        return 8 * self.nbytes() / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> Int4:
        zero = None if self.zero is None else self.zero.to(device)
        return replace(self, codes=self.codes.to(device), inverse_step=self.inverse_step.to(device), zero=zero)


class Int4Format:
    """Rounding to 16 evenly spaced values of each group's own range."""

    name = "int4"

    def pack(self, weight: Tensor, **options: Any) -> Int4:
        """Round a (O, I) weight. Options: `block` (128), the weights of a group; `symmetric` (False).

        |x - x^| <= 1 / (2 s) for x as float32, within the rounding of float32 at the magnitude of the group.

        Raises:
            UnknownName: another option.
            ConfigError: an option out of range.
            PackError: a weight that is not 2-D, not floating, empty, not finite or beyond 2**126.
        """
        check_options(options, ("block", "symmetric"), self.name)
        block = checked_size(options.get("block", BLOCK), "block", self.name)
        symmetric = checked_flag(options.get("symmetric", False), "symmetric", self.name)
        weight = checked_weight(weight, self.name)
        rows, columns = weight.shape
        groups = num_groups(columns, block)
        codes = torch.empty(rows, (columns + 1) // 2, dtype=torch.uint8, device=weight.device)
        inverse_step = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
        zero = None if symmetric else torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
        for chunk in row_chunks(rows, columns):
            # One column more where their number is odd: its nibble is 0.
            width = columns + columns % 2
            values = torch.zeros(chunk.stop - chunk.start, width, dtype=torch.float32, device=weight.device)
            used = values[:, :columns].copy_(weight[chunk])
            for group, places in grouped(used, block):
                low, inverse = _range(group, weight, symmetric)
                if zero is not None:
                    zero[chunk, places] = low
                    group.sub_(low.unsqueeze(2))
                group.mul_(inverse.unsqueeze(2)).round_()
                inverse_step[chunk, places] = inverse
            if symmetric:
                used.add_(SYMMETRIC_SHIFT)
            nibbles = values.clamp_(0, 15).to(torch.uint8)
            codes[chunk] = (nibbles[:, ::2] << 4) | nibbles[:, 1::2]
        return Int4((rows, columns), block, codes, inverse_step, zero)

    def from_tensors(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Int4:
        """A packed weight again.

        Raises:
            BaseBroken: a tensor or setting is missing, unexpected or misshapen.
        """
        stored = Stored(self.name, tensors, settings)
        rows, columns = stored.shape()
        block = stored.group_size(stored.setting("block", int))
        groups = (rows, num_groups(columns, block))
        codes = stored.tensor("codes", torch.uint8, (rows, (columns + 1) // 2))
        inverse_step = stored.inverse_step("inverse_step", groups)
        symmetric = stored.setting("symmetric", bool)
        zero = None if symmetric else stored.tensor("zero", torch.float32, groups)
        stored.done()
        return Int4((rows, columns), block, codes, inverse_step, zero)


def _range(group: Tensor, weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """The smallest value and the inverse step of each group, (rows, groups) both."""
    low, high = group.amin(dim=2), group.amax(dim=2)
    largest = torch.maximum(low.abs(), high.abs())
    check_magnitude(weight, largest, "int4")
    return low, inverse_of(largest, 7) if symmetric else inverse_of(high - low, 15)


@cache
def _pairs(device: torch.device, shift: int) -> Tensor:
    """For each byte the float32 pair that its nibbles stand for before scaling, seen as one int64."""
    # The device is named: models are often made inside `torch.device("meta")`, and this table outlives that.
    values = torch.arange(16, dtype=torch.float32, device="cpu") - shift
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1).contiguous()
    return pairs.view(torch.int64).flatten().to(device)


INT4 = Int4Format()
