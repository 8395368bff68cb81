"""What a run will hold at its peak, said before step 1: what it holds by then, and what its members and steps add.

`manylora plan` follows the real step and takes seconds for that. Here what was measured to make the steps fit is used
again, so it costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import torch

from manylora.memory.device import MOST_PRODUCT_BYTES, NEW_PRODUCTS, PRODUCT_BYTES, available_bytes

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel

PRODUCTS = 120
"""Products of a step that differ in their shapes: 39 to 212 in three configurations of bench/plan.py, an estimate for
all others; what it is off by is at most `MOST_PRODUCT_BYTES`."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What a process holds now, what is still to come (None: not known), and what is free for it; bytes."""

    held_bytes: int
    coming_bytes: int | None
    free_bytes: int

    @property
    def peak_bytes(self) -> int | None:
        """What `memory.peak_bytes` will find at the end."""
        return None if self.coming_bytes is None else self.held_bytes + self.coming_bytes

    def line(self) -> str:
        """What the log says."""
        free = f"{_gib(self.free_bytes)} are free"
        if self.peak_bytes is None or self.coming_bytes is None:
            return f"expected peak memory is not known: this base's loss cannot be followed without numbers; {free}"
        verdict = f"; {free}" if self.coming_bytes <= self.free_bytes else f", MORE THAN what is free: {free}"
        return f"expected peak memory {_gib(self.peak_bytes)}, of which {_gib(self.held_bytes)} are held now{verdict}"


def expected(base: FrozenModel, coming_bytes: int | None, *, num_steps: int | None = None) -> Expected:
    """What a run will hold whose members and forwards are to take `coming_bytes`, before any of them is there.

    `num_steps` decides how much of their caches kernels come to fill; None: all.
    """
    device = base.device
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss
    if coming_bytes is not None and device.type == "cpu":
        each = PRODUCT_BYTES.get(base.dtype, 0.0)
        grown = MOST_PRODUCT_BYTES if num_steps is None else each * PRODUCTS * num_steps**NEW_PRODUCTS
        coming_bytes += round(min(grown, MOST_PRODUCT_BYTES)) if each else 0
    return Expected(held, coming_bytes, available_bytes(device))


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"
