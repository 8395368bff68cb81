"""What a device's memory holds: what is free, what was the most so far, and what kernels keep."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import psutil
import torch

SAFETY_SHARE = 0.8
"""Of the free memory, what a fleet may plan with: the rest is for evaluation, for fragments, and for whatever else runs
on the machine."""

PRODUCT_BYTES = {torch.bfloat16: 0.7 * 2**20, torch.float16: 0.7 * 2**20}
"""What kernels keep for each product of a step that differs from the others in its shapes, by the base's dtype: oneDNN
compiles it and keeps it. Measured with the same as the growth of what malloc says is in use: 0.58 to 0.72 MiB over
three runs of 120 to 239 such products, and next to none in float32."""
NEW_PRODUCTS = 0.32
"""The power of the number of steps with which that grows, since packed sequences have ever new lengths: 83, 119, 162,
230 and 307 MiB after 1, 3, 11, 29 and 59 steps on the base of 6 M parameters."""
MOST_PRODUCT_BYTES = 375 * 2**20
"""Where that ends: oneDNN keeps 1024 compiled products; an estimate from the same run."""


def peak_bytes(device: torch.device) -> int:
    """Peak memory so far: of the device's allocator on CUDA, resident memory of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # there is none on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_bytes(device: torch.device) -> int:
    """What a fleet may plan with on a device: a safe share of its free memory, a container's limit respected."""
    return int(SAFETY_SHARE * available_bytes(device))


def available_bytes(device: torch.device) -> int:
    """The free memory of a device, a container's limit respected."""
    if device.type == "cuda":
        # What the allocator holds and does not use is free too.
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached
    elif device.type == "mps":
        free = torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    else:
        free = min(psutil.virtual_memory().available, _left_in_container(Path("/sys/fs/cgroup")))
    return max(0, int(free))


def _left_in_container(folder: Path) -> float:
    """Bytes that a container's limit leaves, pages of files that it may drop counted as free; inf without a limit."""
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        dropped = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        return math.inf if limit == "max" else int(limit) - int(used) + int(dropped.get("inactive_file", 0))
    except (OSError, ValueError):
        return math.inf
