"""Dropout whose mask is a pure function of (row stream, site), so nothing is stored and nothing restored."""

from __future__ import annotations

import zlib
from functools import lru_cache

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1
LEVELS = 1 << 15
"""Steps of a dropout probability."""


def mix(*parts: int) -> int:
    """A 64-bit seed from whole numbers; every part changes about half of its bits.

    Source: SplitMix64's finaliser (Steele, Lea and Flood, 2014).
    """
    state = 0x9E3779B97F4A7C15
    for part in parts:
        state = (state + (part & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


@lru_cache(maxsize=4096)
def site_key(name: str) -> int:
    """A number for a site's name that is the same on every machine and in every process."""
    return zlib.crc32(name.encode())


def dropout_mask(stream: int, site: str, shape: tuple[int, int], probability: float, like: Tensor) -> Tensor:
    """(tokens, width) of 0 and 1 / (1 - p), in the dtype and on the device of `like`.

    The mask of a row's first tokens does not depend on how many follow, so padding a row changes nothing. p is
    `probability` to the nearest of 1/32768: a draw of 64 bits serves four items, and whole numbers of 16 bits are
    compared by a shift, a third of the time of `torch.rand(shape) >= probability`.
    """
    generator = torch.Generator(device=like.device)
    generator.manual_seed(mix(stream, site_key(site)) >> 1)
    count = shape[0] * shape[1]
    drawn = torch.empty(-(-count // 4), dtype=torch.int64, device=like.device).random_(generator=generator)
    # 15 bits of each quarter: random_ leaves the topmost of an int64 zero, and the difference cannot overflow.
    bits = drawn.view(torch.int16)[:count].bitwise_and_(LEVELS - 1)
    threshold = min(round(probability * LEVELS), LEVELS - 1)
    dropped = bits.sub_(threshold).bitwise_right_shift_(15)  # -1 below the threshold, else 0
    return dropped.add_(1).to(like.dtype).mul_(LEVELS / (LEVELS - threshold)).view(shape)
