"""Four-bit blocks in plain torch operations: the reference, which works wherever torch does.

Weights are taken as one flat run; a block is `block` neighbours, the last one may be short. Byte i holds weight 2i in
its high nibble and weight 2i + 1 in its low one. Work goes in chunks of whole blocks, so that scratch memory is a few
MiB.
"""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.quant.checks import not_finite
from manylora.quant.codebooks import Codebook, cell

CHUNK = 2**20
"""Weights at a time: float32 scratch of 4 MiB, and enough to keep several threads or a device busy."""
SMALLEST_ABSMAX = 1e-38
"""In place of a smaller largest magnitude, so that its inverse is finite; bitsandbytes' figure."""


def quantise(weight: Tensor, block: int, book: Codebook, name: str) -> tuple[Tensor, Tensor]:
    """The codes, uint8 (ceil(N / 2),), and the largest magnitude of each block, float32 (ceil(N / block),).

    Semantics: absmax_b = max |w|; code = nearest(w / absmax_b), from below where two values are equally near.

    A short last block is divided by its absmax, whole ones are multiplied by its inverse; a short block of zeros has
    absmax 1e-38, a whole one 0; a last low nibble without a weight holds the code of zero. All as in bitsandbytes.

    Raises:
        PackError: a value that is not finite as float32, with its place.
    """
    flat = weight.reshape(-1)
    count = flat.numel()
    whole = count - count % block
    codes = torch.empty((count + 1) // 2, dtype=torch.uint8, device=flat.device)
    absmax = torch.empty(-(-count // block), dtype=torch.float32, device=flat.device)
    step = max(1, CHUNK // block) * block
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        blocks = flat[start:stop].to(torch.float32).view(-1, block)
        largest = blocks.abs().amax(dim=1)
        _check(largest, weight, name)
        scaled = blocks * (1.0 / largest.clamp(min=SMALLEST_ABSMAX)).unsqueeze(1)
        codes[start // 2 : stop // 2] = _bytes(scaled.view(-1), book)
        absmax[start // block : stop // block] = largest
    if whole < count:
        rest = flat[whole:].to(torch.float32)
        largest = rest.abs().amax().clamp(min=SMALLEST_ABSMAX)
        _check(largest, weight, name)
        scaled = torch.zeros(len(rest) + len(rest) % 2, dtype=torch.float32, device=flat.device)
        scaled[: len(rest)] = rest / largest
        codes[whole // 2 :] = _bytes(scaled, book)
        absmax[-1] = largest
    return codes, absmax


def dequantise(codes: Tensor, absmax: Tensor, block: int, book: Codebook, out: Tensor) -> None:
    """Fill `out` (N,), of any floating dtype, with value x absmax: the product in float32, then rounded once."""
    count = out.numel()
    step = max(1, CHUNK // block) * block
    for start in range(0, count, step):
        stop = min(start + step, count)
        pairs = book.pairs.index_select(0, codes[start // 2 : (stop + 1) // 2].to(torch.int32))
        values = pairs.view(torch.float32)
        scales = absmax[start // block : -(-stop // block)].unsqueeze(1)
        whole = (stop - start) - (stop - start) % block
        values[:whole].view(-1, block).mul_(scales[: whole // block])
        if whole < stop - start:
            values[whole:].mul_(scales[-1])
        out[start:stop] = values[: stop - start]


def _check(largest: Tensor, weight: Tensor, name: str) -> None:
    if not bool(largest.isfinite().all()):
        raise not_finite(weight, name)


def _bytes(scaled: Tensor, book: Codebook) -> Tensor:
    """Two codes a byte, from scaled weights that are changed in place; an even number of them."""
    scaled.clamp_(-1, 1)
    cells = cell(scaled)
    ranks = book.below.index_select(0, cells).add_(scaled > book.midpoint.index_select(0, cells))
    ranks = ranks if book.ascending else book.codes.index_select(0, ranks.to(torch.int32))
    halves = ranks.view(-1, 2)
    return (halves[:, 0] << 4) | halves[:, 1]
