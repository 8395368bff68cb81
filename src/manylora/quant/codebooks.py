"""The tables behind nf4 and fp4: sixteen values of a weight, and 256 values of a scale that is itself quantised.

Source: Dettmers et al., QLoRA (arXiv 2305.14314), appendix E, and bitsandbytes 0.50, whose bits these are.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent, one of fraction, by bit pattern; divided by 12 in float32.
FP4_TWELFTHS = (0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3)
# Both codes of zero stand for it: 0 from below and at zero, 8 from above.
FP4_ASCENDING = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)

NUM_CELLS = 2048
NESTED_BLOCK = 256
NESTED_CELLS = 65536


@dataclass(frozen=True, slots=True, eq=False)
class Codebook:
    """Sixteen values in [-1, 1] on one device, and the tables that make rounding to them two look-ups.

    `pairs` (256,) int64 holds for each byte the float32 pair that its two codes stand for, high nibble first, so that
    one look-up gives two weights. [-1, 1] is cut into NUM_CELLS cells, of which none holds two midpoints between
    neighbouring values: `below` (uint8) is the number of midpoints in lower cells, `midpoint` the cell's own one (or
    infinity). `codes` (16,) uint8 are the codes in ascending order of value.
    """

    values: Tensor
    codes: Tensor
    pairs: Tensor
    below: Tensor
    midpoint: Tensor
    ascending: bool

    @classmethod
    def of(cls, values: Tensor, codes: tuple[int, ...]) -> Codebook:
        order = torch.tensor(codes, device="cpu")
        midpoints = (values[order[:-1]] + values[order[1:]]) / 2
        own = cell(midpoints).long()
        if len(own.unique()) != len(own):
            raise AssertionError("two midpoints share a cell")
        midpoint = torch.full((NUM_CELLS,), torch.inf, dtype=torch.float32, device="cpu")
        midpoint[own] = midpoints
        below = torch.searchsorted(own, torch.arange(NUM_CELLS, device="cpu")).to(torch.uint8)
        pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1).contiguous()
        ascending = codes == tuple(range(16))
        return cls(values, order.to(torch.uint8), pairs.view(torch.int64).flatten(), below, midpoint, ascending)

    def to(self, device: torch.device) -> Codebook:
        tensors = (self.values, self.codes, self.pairs, self.below, self.midpoint)
        values, codes, pairs, below, midpoint = (tensor.to(device) for tensor in tensors)
        return Codebook(values, codes, pairs, below, midpoint, self.ascending)


def cell(scaled: Tensor) -> Tensor:
    """The cell of each value in [-1, 1], int32. Rounding may move a value over an edge, but never out of order."""
    return ((scaled + 1) * (0.5 * NUM_CELLS)).to(torch.int32).clamp_(max=NUM_CELLS - 1)


@cache
def codebook(name: str, device: torch.device) -> Codebook:
    """The values of `nf4` or `fp4` on a device."""
    # Devices are named below: models are often made inside `torch.device("meta")`, and these tables outlive that.
    if device.type != "cpu":
        return codebook(name, torch.device("cpu")).to(device)
    if name == "nf4":
        return Codebook.of(torch.tensor(NF4_VALUES, dtype=torch.float32, device="cpu"), tuple(range(16)))
    twelfths = torch.tensor(FP4_TWELFTHS, dtype=torch.float32, device="cpu")
    return Codebook.of(twelfths / twelfths.max(), FP4_ASCENDING)


@cache
def nested_values(device: torch.device) -> Tensor:
    """The 256 values of a quantised scale, ascending float32: a sign, an exponent of varying length, a fraction.

    Source: Dettmers, 8-Bit Approximations for Parallelism in Deep Learning (arXiv 1511.04561).
    """
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        means = (edges[:-1] + edges[1:]) / 2
        for sign in (1, -1):
            values += (sign * 10 ** (exponent - 6) * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device="cpu").to(device)


@cache
def nested_cells(device: torch.device) -> Tensor:
    """The code of each of 65536 evenly spaced values in [-1, 1], uint8: bitsandbytes' way to round a scale."""
    if device.type != "cpu":
        return nested_cells(torch.device("cpu")).to(device)
    values = nested_values(device)
    midpoints = 0.5 * (values[:-1] + values[1:])
    evenly = -1.0 + (2.0 * torch.arange(NESTED_CELLS, device="cpu").float()) / (NESTED_CELLS - 1)
    return torch.bucketize(evenly, midpoints).to(torch.uint8)
