"""Groups of neighbours within the rows of a matrix, for the affine formats; the last group of a row may be short."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

CHUNK = 2**20
"""Weights at a time: float32 scratch of 4 MiB."""


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Runs of whole rows of about CHUNK values."""
    step = max(1, CHUNK // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def num_groups(columns: int, size: int) -> int:
    return -(-columns // size)


def grouped(matrix: Tensor, size: int) -> list[tuple[Tensor, slice]]:
    """Views (rows, groups, width) of the groups of (rows, columns), each with its places among a row's groups.

    One view of all whole groups, and one of the short one at the end, where they exist.
    """
    columns = matrix.shape[1]
    whole = columns // size
    views = []
    if whole:
        views.append((matrix[:, : whole * size].unflatten(1, (whole, size)), slice(0, whole)))
    if whole * size < columns:
        views.append((matrix[:, whole * size :].unsqueeze(1), slice(whole, whole + 1)))
    return views
