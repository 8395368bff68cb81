"""`int8`: eight bits a weight, symmetric, with one scale per row or per group of neighbours in a row.

Semantics: s = 127 / max |x|; q = round(s x), half to even; x^ = q / s. s is the inverse of the step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manylora.quant.checks import (
    Stored,
    check_dense_dtype,
    check_magnitude,
    check_options,
    checked_size,
    checked_weight,
)
from manylora.quant.groups import grouped, num_groups, row_chunks

LARGEST_CODE = 127


@dataclass(frozen=True, slots=True, eq=False)
class Int8:
    """A (O, I) weight as codes in -127..127, int8 (O, I), and `inverse_step`, float32 (O, groups of a row).

    `block` is the number of weights of a group; None: the whole row.
    """

    block: int | None
    codes: Tensor
    inverse_step: Tensor

    @property
    def format(self) -> str:
        return "int8"

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.codes.shape
        return rows, columns

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, (O, I), new each time: divided in float32, rounded once to `dtype`.

        Raises:
            ConfigError: a dtype that is not floating, or of eight bits.
        """
        check_dense_dtype(dtype)
        rows, columns = self.shape
        out = torch.empty(rows, columns, dtype=dtype, device=self.codes.device)
        for chunk in row_chunks(rows, columns):
            values = out[chunk].copy_(self.codes[chunk]) if dtype == torch.float32 else self.codes[chunk].float()
            inverse_step = self.inverse_step[chunk].unsqueeze(2)
            for group, places in grouped(values, self.block or columns):
                group.div_(inverse_step[:, places])
            if dtype != torch.float32:
                out[chunk] = values
        return out

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes, "inverse_step": self.inverse_step}

    def settings(self) -> dict[str, Any]:
        return {"format": "int8", "shape": list(self.shape), "block": self.block}

    def nbytes(self) -> int:
        return self.codes.nbytes + self.inverse_step.nbytes

    def bits(self) -> float:
        return 8 * self.nbytes() / self.codes.numel()

    def to(self, device: torch.device | str) -> Int8:
        return replace(self, codes=self.codes.to(device), inverse_step=self.inverse_step.to(device))


class Int8Format:
    """Symmetric rounding to 255 codes."""

    name = "int8"

    def pack(self, weight: Tensor, **options: Any) -> Int8:
        """Round a (O, I) weight. Option: `block`, the weights that share a scale (None: a whole row).

        |x - x^| <= 1 / (2 s) for x as float32, within the rounding of the product s x (a part in 2**16 of it). A group
        of zeros has s = 1.

        Raises:
            UnknownName: another option.
            ConfigError: a block that is no number of weights.
            PackError: a weight that is not 2-D, not floating, empty, not finite or beyond 2**126.
        """
        check_options(options, ("block",), self.name)
        block = options.get("block")
        if block is not None:
            block = checked_size(block, "block", self.name)
        weight = checked_weight(weight, self.name)
        rows, columns = weight.shape
        size = block or columns
        codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
        inverse_step = torch.empty(rows, num_groups(columns, size), dtype=torch.float32, device=weight.device)
        for chunk in row_chunks(rows, columns):
            values = weight[chunk].to(torch.float32, copy=True)
            for group, places in grouped(values, size):
                largest = group.abs().amax(dim=2)
                check_magnitude(weight, largest, self.name)
                inverse = inverse_of(largest, LARGEST_CODE)
                group.mul_(inverse.unsqueeze(2))
                inverse_step[chunk, places] = inverse
            codes[chunk] = values.round_()
        return Int8(block, codes, inverse_step)

    def from_tensors(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Int8:
        """A packed weight again.

        Raises:
            BaseBroken: a tensor or setting is missing, unexpected or misshapen.
        """
        stored = Stored(self.name, tensors, settings)
        rows, columns = stored.shape()
        block = stored.setting("block", int, type(None))
        codes = stored.tensor("codes", torch.int8, (rows, columns))
        groups = num_groups(columns, stored.group_size(block) if block is not None else columns)
        inverse_step = stored.inverse_step("inverse_step", (rows, groups))
        stored.done()
        return Int8(block, codes, inverse_step)


def inverse_of(span: Tensor, codes: int) -> Tensor:
    """The inverse step s = codes / span, float32: finite where the span is below float32's inverse, 1 where it is 0."""
    inverse = (codes / span).clamp_(max=torch.finfo(torch.float32).max)
    return inverse.masked_fill_(span == 0, 1.0)


INT8 = Int8Format()
