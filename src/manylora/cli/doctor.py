"""`manylora doctor`: the machine, the versions, and which fast paths run here and why not."""

from __future__ import annotations

import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from manylora.cli.output import AsJson, Output

PACKAGES = (
    "manylora",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "bitsandbytes",
    "safetensors",
    "huggingface_hub",
    "peft",
    "numpy",
    "pydantic",
)
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16")
PRODUCT_SIZE = 768
PRODUCT_SECONDS = 0.15


def doctor(as_json: AsJson = False) -> None:
    """Show the machine and its fast paths."""
    import torch

    from manylora.base.load import choose_device, choose_dtype
    from manylora.quant import backend

    output = Output(as_json)
    device, why_device = choose_device("auto")
    _, why_dtype = choose_dtype("bfloat16", device)
    rates = {name: _product_rate(getattr(torch, name), device) for name in ("float32", "bfloat16")}
    facts: dict[str, Any] = {
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpu flags": ", ".join(_cpu_flags()) or "none of " + ", ".join(FLAGS),
        "cores": f"{_usable_cores()} usable of {os.cpu_count()}, {torch.get_num_threads()} torch threads",
        "memory": _memory(),
        "cuda": _cuda(),
        "chosen": f"{why_device}; {why_dtype}",
        "products": _verdict(rates),
        "packed weights": ": ".join(backend(device)),
        "encoded rows": _cache(),
    }
    versions = {name: _version(name) for name in PACKAGES}
    width = max(map(len, [*facts, *versions]))
    for name, value in {**facts, **versions}.items():
        output.line(f"{name:<{width}}  {value or 'not installed'}")
    output.finish(facts | {"versions": versions, "gflops": rates, "device": str(device)})


def _cache() -> str:
    from manylora.data.cache import cache_folder, entries

    sizes = [size for _, size in entries()]
    return f"{len(sizes)} data sets, {sum(sizes) / 2**20:.1f} MiB, in {cache_folder()}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_info() -> dict[str, str]:
    """The first processor of /proc/cpuinfo; nothing on systems without it."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n\n")[0].splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _cpu_name() -> str:
    return _cpu_info().get("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> list[str]:
    info = _cpu_info()
    present = info.get("flags", info.get("Features", "")).split()
    return [flag for flag in FLAGS if flag in present]


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB"


def _cuda() -> str:
    import torch

    if not torch.backends.cuda.is_built():
        return "this torch was built without it"
    if not torch.cuda.is_available():
        return f"torch is built for CUDA {torch.version.cuda}, and no device answers"
    names = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{device.name} ({device.total_memory / 2**30:.0f} GiB)" for device in names)


def _product_rate(dtype: Any, device: Any) -> float:
    """Billions of floating-point operations a second of a square matrix product, measured."""
    import torch

    x = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE, device=device).to(dtype)
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    torch.matmul(x, x)
    settle()
    count, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < PRODUCT_SECONDS or count < 2:
        torch.matmul(x, x)
        settle()
        count += 1
    return 2 * PRODUCT_SIZE**3 * count / elapsed / 1e9


def _verdict(rates: dict[str, float]) -> str:
    ratio = rates["bfloat16"] / rates["float32"]
    words = "faster" if ratio > 1.1 else "slower: train with dtype: float32" if ratio < 0.9 else "no faster"
    numbers = ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items())
    return f"{numbers} GFLOP/s, so bfloat16 is {words} ({ratio:.1f}x)"
