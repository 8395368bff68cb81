"""The leading part of a matrix as a pair of low-rank factors, each of which carries half of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ITERATIONS = 4
"""Power iterations of the randomised decomposition; PEFT's `pissa_niter_4` too."""
OVERSAMPLING = 16
"""Directions that the randomised decomposition follows beside those that are asked for."""
EXACT_SIDE = 256
"""Up to this shorter side the exact decomposition takes milliseconds, so nothing is gained by an approximate one."""


def leading_factors(matrix: Tensor, rank: int, scale: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """a (R, I) and b (O, R) with s b a the best approximation of a matrix (O, I) of rank R; float32 or better.

    Semantics: `U, S, V = svd(matrix)`, `b = U[:, :R] * sqrt(S[:R] / s)`, `a = sqrt(S[:R] / s)[:, None] * V[:, :R].T`.

    A direction that the matrix does not have would be zero in both factors and could then never be learned: its row of
    a is random, as in a plain start, and its column of b is zero.
    """
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    left, values, right = leading_directions(matrix, rank, generator)
    halves = (values / scale).sqrt()
    a, b = halves[:, None] * right, left * halves
    absent = values <= torch.finfo(matrix.dtype).eps * max(matrix.shape) * values.max()
    if absent.any():
        bound = 1 / math.sqrt(matrix.shape[1])
        random = (torch.rand(rank, matrix.shape[1], generator=generator) * 2 - 1) * bound
        a[absent] = random.to(a)[absent]
        b[:, absent] = 0.0
    return a.contiguous(), b.contiguous()


def leading_directions(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U (O, R), S (R,) in falling order and V^T (R, I) of the R largest singular values.

    Exact for a small matrix or a rank near its sides; else randomised, with draws from `generator`.

    Source: Halko, Martinsson and Tropp (0909.4061), algorithms 4.4 and 5.1.
    """
    followed = rank + OVERSAMPLING
    if min(matrix.shape) <= EXACT_SIDE or 2 * followed >= min(matrix.shape):
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        return left[:, :rank], values[:rank], right[:rank]
    draws = torch.randn(matrix.shape[1], followed, generator=generator, dtype=matrix.dtype).to(matrix.device)
    span = torch.linalg.qr(matrix @ draws)[0]
    for _ in range(ITERATIONS):
        span = torch.linalg.qr(matrix.t() @ span)[0]
        span = torch.linalg.qr(matrix @ span)[0]
    inner, values, right = torch.linalg.svd(span.t() @ matrix, full_matrices=False)
    return (span @ inner)[:, :rank], values[:rank], right[:rank]
