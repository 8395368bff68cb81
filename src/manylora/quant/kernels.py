"""bitsandbytes' kernels for making four-bit weights dense, where they can be used; plain torch elsewhere.

The choice is made once per device and is checked: a kernel is used only after it gave the same bits as the reference.
It may differ in one place: in bfloat16 the AVX-512 kernel writes zero for results below 1.2e-38.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from functools import cache
from importlib import metadata

import torch
from torch import Tensor

from manylora.quant import plain
from manylora.quant.codebooks import codebook

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PROBED_BLOCKS = 512


def backend(device: torch.device | str) -> tuple[str, str]:
    """What makes four-bit weights dense on a device, `bitsandbytes` or `torch`, and why."""
    return _backend(torch.device(device).type)


def runs(device: torch.device, dtype: torch.dtype, block: int) -> bool:
    """Whether bitsandbytes' kernel makes weights of this dtype and block dense here."""
    # Its AVX-512 kernel leaves blocks of 2048 and more to a slower way.
    return dtype in KERNEL_DTYPES and (block < 2048 or device.type != "cpu") and backend(device)[0] == "bitsandbytes"


def dequantise(codes: Tensor, absmax: Tensor, block: int, name: str, dtype: torch.dtype) -> Tensor:
    """Whole blocks made dense by bitsandbytes: (blocks, block), new.

    Blocks are passed as rows whatever the weight's own shape: with rows that are not a multiple of the block, 0.50.2's
    AVX-512 kernel takes the scales of the wrong blocks.
    """
    return torch.ops.bitsandbytes.dequantize_4bit.default(codes, absmax, block, name, [len(absmax), block], dtype)


@cache
def _backend(kind: str) -> tuple[str, str]:
    if kind not in ("cpu", "cuda"):
        return "torch", f"bitsandbytes' kernels are used on cpu and cuda, not on {kind}"
    capability = torch.backends.cpu.get_cpu_capability()
    if kind == "cpu" and capability != "AVX512":
        return "torch", f"this processor has {capability}; bitsandbytes' kernels for it need AVX512"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "torch", "bitsandbytes is not installed"
    try:
        release = metadata.version("bitsandbytes")
        library = _import()
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return "torch", f"bitsandbytes cannot be imported: {_first_line(error)}"
    if type(library).__name__ == "ErrorHandlerMockBNBNativeLibrary":
        return "torch", f"bitsandbytes {release} found no native library for this machine"
    fault = _probe(torch.device(kind))
    if fault:
        return "torch", f"bitsandbytes {release} is installed, but its kernel {fault}"
    return "bitsandbytes", f"kernels of bitsandbytes {release}: the same bits as plain torch in a trial"


def _import() -> object:
    """bitsandbytes' native library. Its import warns of an optional package that is of no use here."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("bitsandbytes")
            return importlib.import_module("bitsandbytes.cextension").lib
    finally:
        logger.setLevel(level)


def _probe(device: torch.device) -> str | None:
    """How the kernel differs from the reference on every code and a range of scales; None where it does not."""
    codes = torch.arange(32 * PROBED_BLOCKS, device="cpu").mul(7).remainder(256).to(torch.uint8).to(device)
    scales = (torch.arange(PROBED_BLOCKS, device="cpu") % 61 - 30).float().exp2().mul(1.37).to(device)
    for name in ("nf4", "fp4"):
        for dtype in KERNEL_DTYPES:
            expected = torch.empty(codes.numel() * 2, dtype=dtype, device=device)
            plain.dequantise(codes, scales, 64, codebook(name, device), expected)
            try:
                found = dequantise(codes, scales, 64, name, dtype)
            except (RuntimeError, AttributeError, NotImplementedError, OSError) as error:
                return f"fails: {_first_line(error)}"
            if not torch.equal(found.view(-1), expected):
                return f"gives other values than the reference ({name}, {dtype})"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
