"""Where a plan is for: how much memory is free there, and how fast it computes."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace

import torch

from manylora.errors import ConfigError, nearest_names
from manylora.memory.device import available_bytes

GIB = 2**30
UNITS = {"gb": 10**9, "gib": GIB, "g": GIB, "mb": 10**6, "mib": 2**20}
KINDS = ("cpu", "cuda", "mps")
KNOWN = {
    "t4": (16, 65e12, 320e9),
    "l4": (24, 121e12, 300e9),
    "a10": (24, 125e12, 600e9),
    "l40s": (48, 362e12, 864e9),
    "a100": (80, 312e12, 2039e9),
    "h100": (80, 989e12, 3350e9),
    "h200": (141, 989e12, 4800e9),
    "b200": (180, 2250e12, 8000e9),
}
"""GB of memory, dense bfloat16 operations and bytes of memory traffic a second (the T4's in float16).

Source: the makers' data sheets, of the form with the most memory bandwidth; not measured here.
"""
HONEST_FRACTION = 0.4
"""Of a data sheet's operations, what training reaches: an assumption, not measured here."""
CONTEXT_BYTES = 600 * 2**20
"""What a CUDA process holds before its first tensor, kernels and libraries; an estimate, not measured here."""


@dataclass(frozen=True, slots=True)
class Device:
    """`free_bytes` of memory to use; `flops` of bfloat16 products and `moved_bytes` a second, None: not known."""

    name: str
    kind: str
    free_bytes: int
    flops: float | None = None
    moved_bytes: float | None = None
    source: str = ""


def parse_device(text: str) -> Device:
    """A device that need not be here, from `cuda:80GB`, `cpu:16GB`, `h100` or `a100:40GB`.

    Raises:
        ConfigError: neither a kind nor a known name, or a size that is no size.
    """
    name, _, size = text.strip().lower().partition(":")
    allowed = "KIND:SIZE as in cuda:80GB or cpu:16GB, or one of " + ", ".join(KNOWN)
    if name not in KINDS and name not in KNOWN:
        raise ConfigError(
            f"--device is {text!r}, and {name!r} is no device that is known",
            nearest=nearest_names(name, [*KINDS, *KNOWN]), allowed=allowed,
        )  # fmt: skip
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(gb|gib|g|mb|mib)", size)
    if size and (match is None or float(match[1]) <= 0):
        raise ConfigError(
            f"--device is {text!r}, and {size!r} is no size", allowed=allowed, next_step="write the size as in 80GB"
        )
    if not size and name in KINDS:
        raise ConfigError(
            f"--device is {text!r}, without a size", allowed=allowed,
            next_step="leave --device out to plan for this machine",
        )  # fmt: skip
    known = KNOWN.get(name)
    total = int(float(match[1]) * UNITS[match[2]]) if match else known[0] * 10**9 if known else 0
    kind = name if name in KINDS else "cuda"
    if known is None:
        return Device(text, kind, total)
    source = f"{HONEST_FRACTION:.0%} of the {known[1] / 1e12:.0f} TFLOP/s of its data sheet, an assumption"
    return Device(text, kind, total, HONEST_FRACTION * known[1], HONEST_FRACTION * known[2], source)


def this_device(name: str) -> Device:
    """The device that a configuration asks for here, with the memory that is free on it now.

    Raises:
        ConfigError: this machine has no such device.
    """
    from manylora.base.load import choose_device

    device, _ = choose_device(name)
    return Device(str(device), device.type, available_bytes(device))


def measured(device: Device, dtype: torch.dtype) -> Device:
    """The same with the speed that a quick trial finds here; less than two seconds."""
    where = torch.device(device.kind)
    size = 1024 if device.kind == "cpu" else 4096
    left, right = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    flops = 2 * size**3 / _seconds(lambda: left @ right, where)
    part = left[: size // 4]
    moved = 3 * part.nbytes / _seconds(lambda: part * part, where)
    return replace(device, flops=flops, moved_bytes=moved, source="of the products that a quick trial reached here")


def _seconds(run: object, where: torch.device) -> float:
    """The shortest of some runs, within about half a second."""
    assert callable(run)
    best, begun = float("inf"), time.perf_counter()
    while time.perf_counter() - begun < 0.4:
        started = time.perf_counter()
        run()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        best = min(best, time.perf_counter() - started)
    return best
