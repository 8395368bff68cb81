"""Freed memory that is kept is not faulted in again, and is given back at the end."""

from __future__ import annotations

import subprocess
import sys

import pytest

from manylora.memory import allocator

MEASURE = """
import resource
from pathlib import Path
from manylora.memory.allocator import freed_memory_kept
block = bytes([1])
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        block * (64 << 20)  # 64 MiB by plain malloc, and freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def held():
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
faults()
start = held()
with freed_memory_kept() as kept:
    faults()
    inside, at_most = faults(), held()
print(kept, inside, faults(), at_most - start, held() - start)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mallopt is glibc's")
def test_freed_memory_is_kept_and_then_given_back() -> None:
    told = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True).stdout.split()
    if told[0] == "False":
        pytest.skip("another malloc")
    inside, outside, held_inside, held_after = map(int, told[1:])
    assert 4 * inside < outside
    assert held_inside > 60 << 20
    assert held_after < 8 << 20


def test_a_system_without_such_a_malloc_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from manylora.memory.allocator import freed_memory_kept

    monkeypatch.setattr(sys, "platform", "darwin")
    with freed_memory_kept() as kept:
        assert not kept


class _OldLibc:
    """A glibc before 2.35: it refuses thresholds above 32 MiB; what was set is remembered."""

    malloc_trim = staticmethod(lambda pad: 1)

    def __init__(self) -> None:
        self.set: dict[int, int] = {}

    def mallopt(self, option: int, value: int) -> int:
        if option == allocator.MMAP_THRESHOLD and value > 32 << 20:
            return 0
        self.set[option] = value
        return 1


def test_a_malloc_that_refuses_the_threshold_is_left_as_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    libc = _OldLibc()
    monkeypatch.setattr(allocator, "_libc", lambda: libc)
    with allocator.freed_memory_kept() as kept:
        assert not kept
        with allocator.lying_apart():
            pass
        assert libc.set[allocator.MMAP_THRESHOLD] == 32 << 20, "blocks of 32 KiB are mapped apart for good"
    assert libc.set[allocator.TRIM_THRESHOLD] == 64 << 20
