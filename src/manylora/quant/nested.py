"""Scales that are quantised themselves ("double quantisation"): a byte a scale instead of four.

Source: QLoRA (arXiv 2305.14314), section 3; the codes, scales and offset are those of bitsandbytes 0.50 on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from manylora.quant.codebooks import NESTED_BLOCK, NESTED_CELLS, nested_cells, nested_values


@dataclass(frozen=True, slots=True, eq=False)
class Nested:
    """Scales (B,) as codes, uint8 (B,), with float32 `absmax` (ceil(B / 256),) and an offset, their mean.

    `values` (256,) is what the codes stand for; None: the usual table, of which a device holds one copy.
    """

    codes: Tensor
    absmax: Tensor
    offset: float
    values: Tensor | None = None

    @classmethod
    def fold(cls, scales: Tensor) -> Nested:
        """Round float32 scales (B,).

        Semantics: a = scales - mean; code = nearest(a / max |a| of its 256), by the cell of 1/65535 that it falls in.

        Scratch: a few times the scales, so a few hundredths of the weight. `mean` adds in an order that depends on the
        number of torch's threads once there are more than 32768 scales, so the offset's last bit does too.
        """
        mean = scales.mean()
        blocks = scales.new_zeros(-(-len(scales) // NESTED_BLOCK) * NESTED_BLOCK)
        blocks[: len(scales)] = scales - mean
        blocks = blocks.view(-1, NESTED_BLOCK)
        absmax = blocks.abs().amax(dim=1)
        # An absmax of 0, or below 3e-39, has no finite inverse; a zero times it counts as the lowest cell.
        scaled = (blocks * (1.0 / absmax).unsqueeze(1)).clamp_(-1, 1)
        cells = ((scaled + 1) * 0.5 * (NESTED_CELLS - 1) + 0.5).nan_to_num_(0).to(torch.int32)
        codes = nested_cells(scales.device).index_select(0, cells.view(-1))
        # A copy, so that no longer storage hangs behind it.
        return cls(codes[: len(scales)].clone(), absmax, float(mean))

    def unfold(self) -> Tensor:
        """The scales that the codes stand for, float32 (B,)."""
        scales = self.table().index_select(0, self.codes.to(torch.int32))
        whole = len(scales) - len(scales) % NESTED_BLOCK
        scales[:whole].view(-1, NESTED_BLOCK).mul_(self.absmax[: whole // NESTED_BLOCK].unsqueeze(1))
        if whole < len(scales):
            scales[whole:].mul_(self.absmax[-1])
        return scales.add_(self.offset)

    def table(self) -> Tensor:
        return nested_values(self.codes.device) if self.values is None else self.values

    def to(self, device: torch.device | str) -> Nested:
        values = None if self.values is None else self.values.to(device)
        return replace(self, codes=self.codes.to(device), absmax=self.absmax.to(device), values=values)

    def nbytes(self) -> int:
        """Bytes of these tensors; the usual table is shared and not counted."""
        return self.codes.nbytes + self.absmax.nbytes + (0 if self.values is None else self.values.nbytes)
