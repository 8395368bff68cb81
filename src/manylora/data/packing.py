"""Sequences into rows of a fixed number of tokens, with little padding: best-fit decreasing."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

WIDTH_STEP = 8  # widths are multiples of this: fast kernels want it, and fewer widths mean fewer compiled graphs


def row_width(longest: int, limit: int) -> int:
    """How many tokens the rows of a batch have whose longest row uses so many: a multiple of 8, at most `limit`."""
    return min(limit, -(-longest // WIDTH_STEP) * WIDTH_STEP)


def pack(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Rows of indices into `lengths`; each index once, no row above `row_tokens` tokens in sum.

    Longest first, each into the fullest row that still has room: at most 11/9 of the least possible number of rows (and
    one more); in practice within a few per cent. O(n log n): rows are found by their room, by bisection.

    Raises:
        ValueError: a length below 1 or above `row_tokens`.
    """
    if lengths and not 1 <= min(lengths) <= max(lengths) <= row_tokens:
        raise ValueError(f"lengths from {min(lengths)} to {max(lengths)} do not fit rows of {row_tokens} tokens")
    rows: list[list[int]] = []
    rooms: list[int] = []  # sorted, each once: rooms that some row has left; at most row_tokens of them
    by_room: dict[int, list[int]] = {}
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        place = bisect_left(rooms, length)
        if place < len(rooms):
            room = rooms[place]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        else:
            room, row = row_tokens, len(rows)
            rows.append([])
        rows[row].append(index)
        left = room - length
        if left:
            if left not in by_room:
                by_room[left] = []
                insort(rooms, left)
            by_room[left].append(row)
    return rows
