"""Codes of one, two or four bits in bytes, row by row; the first code of a byte lies in its highest bits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def num_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of codes."""
    return -(-columns * bits // 8)


def to_bytes(codes: Tensor, bits: int) -> Tensor:
    """Codes 0..2**bits - 1 (rows, n) as uint8 (rows, bytes); the rest of a row's last byte is 0."""
    each = 8 // bits
    padded = functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    packed = torch.zeros(padded.shape[:-1], dtype=torch.uint8, device=codes.device)
    for place in range(each):
        packed |= padded[..., place] << (8 - bits * (place + 1))
    return packed


def from_bytes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The codes (rows, columns) of `to_bytes`, uint8."""
    shifts = range(8 - bits, -1, -bits)
    codes = torch.stack([(packed >> shift) & (2**bits - 1) for shift in shifts], dim=-1)
    return codes.flatten(-2)[..., :columns]
