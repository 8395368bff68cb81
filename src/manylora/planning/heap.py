"""How far a heap grows that serves a computation's storages one after another, holes and all.

Semantics: an aligned block is cut out of the smallest hole that holds it and its alignment, else out of the end of the
heap, as glibc's `memalign` does; what is freed joins the holes beside it. A hole as large as a block does not hold it,
for room to align is asked for first. What the process allocates meanwhile (graphs, kernels' caches) settles in the
slivers before blocks and keeps the holes on its two sides apart: of `PINNED_SHARE` of them, for good.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence
from math import sqrt
from statistics import mean, stdev

ALIGNMENT = 64
"""Of tensors' storages, in bytes. Source: c10's CPU allocator."""
UNIT = 16
LEAST_BYTES = 32
"""Of a block of glibc, its header included."""
PINNED_SHARE = 0.03
"""Measured on 2026-11-21 with glibc 2.36 and `manylora train` of three steps: the heap over what was alive in it is
1.26, 1.25 and 1.16 with bases of 6 M parameters in bfloat16 and float32 and of 135 M, and 2.5 where blocks of 288 MiB
are many (a head of 131,072 tokens is trained). Simulated: 1.10, 1.03, 1.07 and 2.4. bench/plan.py shows what it comes
to in all."""
LEAST_DRAWS, MOST_DRAWS = 7, 64
DRAWN_TO = 0.03
"""Simulations go on until the standard error of their mean is that share of it. Where blocks are few and large, much
depends on which holes are pinned: with blocks of 288 MiB simulations differ by a sixth (standard deviation), and four
times the same run held 3579, 3617, 3746 and 4213 MiB; with blocks of a few MiB seven simulations do."""


class Heap:
    """Holes by size and by both ends; `top` is the end of its last block, `most` how far that ever was, in bytes."""

    def __init__(self, pinned_share: float = PINNED_SHARE, seed: int = 0) -> None:
        self.top = self.most = 0
        self._share = pinned_share
        self._draw = random.Random(seed)
        self._sizes: list[tuple[int, int]] = []
        self._starts: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._pinned: set[int] = set()

    def take(self, num_bytes: int) -> tuple[int, int]:
        """A block's (start, size)."""
        size = _rounded(num_bytes + UNIT // 2)
        needed = size + ALIGNMENT + LEAST_BYTES
        place = bisect_left(self._sizes, (needed, -1))
        if place < len(self._sizes):
            held, start = self._sizes[place]
            self._remove(start, held)
            end = start + held
        else:
            start = self.top
            if self.top in self._ends and self.top not in self._pinned:
                start -= self._ends[self.top]
                self._remove(start, self.top - start)
            end = self.top = start + needed
        aligned = -(-(start + UNIT) // ALIGNMENT) * ALIGNMENT - UNIT
        if 0 < aligned - start < LEAST_BYTES:
            aligned += ALIGNMENT
        if aligned > start:
            self._add(start, aligned - start)
            if self._draw.random() < self._share:
                self._pinned.add(aligned)
        if end == self.top:
            self.top = aligned + size
        elif end > aligned + size:
            self.give((aligned + size, end - aligned - size))
        self.most = max(self.most, self.top)
        return aligned, size

    def give(self, block: tuple[int, int]) -> None:
        """Free a block."""
        start, size = block
        end = start + size
        if end in self._starts and end not in self._pinned:
            size += self._starts[end]
            self._remove(end, self._starts[end])
        if start in self._ends and start not in self._pinned:
            before = self._ends[start]
            self._remove(start - before, before)
            start, size = start - before, size + before
        self._add(start, size)

    def _add(self, start: int, size: int) -> None:
        insort(self._sizes, (size, start))
        self._starts[start] = size
        self._ends[start + size] = size

    def _remove(self, start: int, size: int) -> None:
        del self._sizes[bisect_left(self._sizes, (size, start))]
        del self._starts[start], self._ends[start + size]


def grown(events: Sequence[tuple[int, int]], *, rounds: int = 1, pinned_share: float = PINNED_SHARE) -> int:
    """Bytes that a heap grows to by events (block, bytes) that take a block, or with bytes 0 free it, `rounds` times.

    Blocks that a round leaves are freed at its end. The mean of simulations that differ in which holes are pinned.
    """
    found: list[int] = []
    for seed in range(MOST_DRAWS):
        found.append(_grown(events, rounds, Heap(pinned_share, seed)))
        if len(found) >= LEAST_DRAWS and stdev(found) / sqrt(len(found)) <= DRAWN_TO * mean(found):
            break
    return round(mean(found))


def _grown(events: Sequence[tuple[int, int]], rounds: int, heap: Heap) -> int:
    for _ in range(rounds):
        held: dict[int, tuple[int, int]] = {}
        for block, num_bytes in events:
            if num_bytes:
                held[block] = heap.take(num_bytes)
            elif block in held:
                heap.give(held.pop(block))
        for block in held.values():
            heap.give(block)
    return heap.most


def _rounded(num_bytes: int) -> int:
    return -(-num_bytes // UNIT) * UNIT
