"""Freed memory that stays with the process, so that a step does not fault in what the step before gave back."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Source: M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of mallopt(3)."""
MIB = 1 << 20
APART = 32 << 10
"""Bytes from which a block lies apart."""


def _libc() -> ctypes.CDLL | None:
    """The C library with malloc's options, None where it has none."""
    try:
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        return libc if libc is not None and libc.mallopt and libc.malloc_trim else None
    except (OSError, AttributeError):  # another C library
        return None


def give_back_freed() -> None:
    """Return the freed memory of this process to the system, holes within its heap too; where glibc's malloc is."""
    libc = _libc()
    if libc is not None:
        libc.malloc_trim(0)


class _Heap:
    """How large a block glibc takes from its heap at present; None: as it comes."""

    threshold: int | None = None


@contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """While it is open, glibc keeps what is freed for what is asked for next; whether this process has such a malloc.

    As it comes, malloc takes each block above 32 MiB from the system and gives it back, and trims its heap when much
    is free at its end: a training step of 16 members on a base of 135 M parameters then faults 180,000 pages in, one
    second in eight on one thread. What stays should lie apart (`lying_apart`). At the end what is free is given back.
    """
    libc = _libc()
    if libc is None or _Heap.threshold is not None:
        yield False
        return
    # Before 2.35 glibc refuses a threshold above 32 MiB. Were `lying_apart` to lower it then, nothing would raise it
    # again, and every larger block would be mapped apart to the end.
    if not (libc.mallopt(TRIM_THRESHOLD, 2047 * MIB) and libc.mallopt(MMAP_THRESHOLD, 1024 * MIB)):
        _as_it_comes(libc)
        yield False
        return
    _Heap.threshold = 1024 * MIB
    try:
        yield True
    finally:
        _Heap.threshold = None
        _as_it_comes(libc)
        give_back_freed()


def _as_it_comes(libc: ctypes.CDLL) -> None:
    """What malloc's own adaptation may come to at most."""
    libc.mallopt(MMAP_THRESHOLD, 32 * MIB)
    libc.mallopt(TRIM_THRESHOLD, 64 * MIB)


@contextmanager
def lying_apart() -> Iterator[None]:
    """What is allocated while it is open, and is no small block, lies apart from the heap: for what outlives a step.

    Factors and optimiser states among the activations of a step leave holes that nothing fits: each further member of
    rank 16 on that base took 139 MB of the process's peak so, and takes 121 MB with them apart.
    """
    libc = _libc() if _Heap.threshold is not None else None
    if libc is None:
        yield
        return
    libc.mallopt(MMAP_THRESHOLD, APART)
    try:
        yield
    finally:
        libc.mallopt(MMAP_THRESHOLD, _Heap.threshold or 32 * MIB)
