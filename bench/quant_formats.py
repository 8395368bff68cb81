"""The storage formats: bytes equal to bitsandbytes' where it has the format, error, bits, and speed.

    python bench/quant_formats.py

Stops when a byte of nf4 or fp4 differs from bitsandbytes: codes, absmax, nested absmax, offset, and the dense weight,
on 10^7 normal values, every tail of 1 to 130 values, and odd shapes. Speeds are medians of rounds on one weight; those
of bitsandbytes are its own functions on the same weight. Writes bench/results/quant_formats.json.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from results import write_result

ROUNDS = 9
MANY = (2500, 4000)
ODD_SHAPES = ((1, 1), (3, 5), (9, 65), (17, 31), (33, 129), (100, 77), (257, 255), (576, 1536), (1001, 999))
SPEED_SHAPES = ((1536, 576), (4096, 4096))
VARIANTS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("nf4, block 64", "nf4", {"double_quant": False}),
    ("nf4, block 64, double quantisation", "nf4", {}),
    ("fp4, block 64", "fp4", {"double_quant": False}),
    ("fp4, block 64, double quantisation", "fp4", {}),
    ("int4, block 128", "int4", {}),
    ("int4, block 64", "int4", {"block": 64}),
    ("int4, block 64, symmetric", "int4", {"block": 64, "symmetric": True}),
    ("int8, a row of 4000", "int8", {}),
    ("int8, block 64", "int8", {"block": 64}),
)


def main() -> None:
    from manylora import quant

    draw = torch.Generator().manual_seed(0)
    many = torch.randn(*MANY, generator=draw)
    compared = 0
    for name in ("nf4", "fp4"):
        weights = [many, *(torch.randn(1, size, generator=draw) for size in range(1, 131))]
        weights += [torch.randn(*shape, generator=draw) for shape in ODD_SHAPES]
        weights += [many[:500].to(dtype) for dtype in (torch.bfloat16, torch.float16)]
        for weight in weights:
            compare(weight, name)
            compared += weight.numel()
    figures: dict[str, Any] = {
        "values compared with bitsandbytes": compared,
        "differing bytes of codes, absmax, nested absmax, offset and dense weights": 0,
        "backend": list(quant.backend("cpu")),
        "threads": torch.get_num_threads(),
        "bitsandbytes": metadata.version("bitsandbytes"),
        "rounds": ROUNDS,
        "formats": {},
        "billion weights a second": {},
    }
    for label, name, options in VARIANTS:
        packed = quant.pack(many, name, **options)
        error = (packed.dense(torch.float32).double() - many).square().mean().sqrt()
        figures["formats"][label] = {
            "bits per weight": round(packed.bits(), 4),
            "rmse on N(0, 1)": round(float(error), 5),
        }
    for shape in SPEED_SHAPES:
        weight = torch.randn(*shape, generator=draw)
        figures["billion weights a second"][f"{shape[0]} x {shape[1]}"] = speeds(weight)
    write_result("quant_formats", figures)


def compare(weight: torch.Tensor, name: str) -> None:
    """Stop unless ours and bitsandbytes' bytes of a weight are the same."""
    from bitsandbytes import functional

    from manylora.quant import kernels, plain
    from manylora.quant.codebooks import codebook
    from manylora.quant.four_bit import FourBitFormat

    codes, state = functional.quantize_4bit(weight, quant_type=name, compress_statistics=True)
    _, single = functional.quantize_4bit(weight, quant_type=name)
    ours = FourBitFormat(name).pack(weight)
    nested = ours.nested
    pairs = {
        "codes": (ours.codes, codes.flatten()),
        "absmax": (FourBitFormat(name).pack(weight, double_quant=False).scales(), single.absmax),
        "nested codes": (nested.codes, state.absmax),
        "nested absmax": (nested.absmax, state.state2.absmax),
        "offset": (torch.tensor(nested.offset), state.offset),
    }
    whole = weight.numel() - weight.numel() % 64
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        expected = torch.empty(weight.numel(), dtype=dtype)
        plain.dequantise(ours.codes, ours.scales(), 64, codebook(name, weight.device), expected)
        pairs[f"dense in {dtype}"] = (ours.dense(dtype).view(-1), expected)
        if whole:
            # As rows of a block: with other rows, bitsandbytes' own shape takes the scales of the wrong blocks.
            theirs = kernels.dequantise(ours.codes[: whole // 2], ours.scales()[: whole // 64], 64, name, dtype)
            pairs[f"bitsandbytes' dense in {dtype}"] = (expected[:whole], theirs.view(-1))
    for what, (found, expected) in pairs.items():
        bits = [tensor.contiguous().view(-1).view(torch.uint8) for tensor in (found, expected)]
        if not torch.equal(*bits):
            raise SystemExit(f"{what} of {name} differ from bitsandbytes for a weight of shape {tuple(weight.shape)}")


def speeds(weight: torch.Tensor) -> dict[str, dict[str, float]]:
    """Packing from float32, and making dense in two dtypes; bitsandbytes and plain torch beside ours."""
    from bitsandbytes import functional

    from manylora import quant
    from manylora.quant import kernels

    found: dict[str, dict[str, float]] = {}
    for name in quant.PACKINGS:
        packed = quant.pack(weight, name)
        rates = {"pack": rate(weight, lambda name=name: quant.pack(weight, name))}
        for dtype in (torch.float32, torch.bfloat16):
            dense = {f"dense {dtype}": lambda packed=packed, dtype=dtype: packed.dense(dtype)}
            if name in ("nf4", "fp4"):
                unfolded = quant.unfold(packed)
                dense[f"dense {dtype}, unfolded"] = lambda packed=unfolded, dtype=dtype: packed.dense(dtype)
            rates |= {label: rate(weight, run) for label, run in dense.items()}
            if name in ("nf4", "fp4"):
                runs, kernels.runs = kernels.runs, lambda *_: False
                rates |= {f"{label}, plain torch": rate(weight, run) for label, run in dense.items()}
                kernels.runs = runs
        if name in ("nf4", "fp4"):
            how = {"quant_type": name, "compress_statistics": True}
            rates["bitsandbytes pack"] = rate(weight, lambda how=how: functional.quantize_4bit(weight, **how))
            codes, state = functional.quantize_4bit(weight, **how)
            for dtype in (torch.float32, torch.bfloat16):
                state.dtype = dtype
                rates[f"bitsandbytes dense {dtype}"] = rate(
                    weight, lambda codes=codes, state=state: functional.dequantize_4bit(codes, state)
                )
        found[name] = {label.replace("torch.", ""): value for label, value in rates.items()}
    for dtype in (torch.float32, torch.bfloat16):
        copied = rate(weight, lambda dtype=dtype: weight.to(dtype, copy=True))
        found.setdefault("a copy of the float32 weight", {})[f"in {dtype}".replace("torch.", "")] = copied
    return found


def rate(weight: torch.Tensor, run: Callable[[], object]) -> float:
    """Billions of weights a second: the median round after one that is not counted."""
    run()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return round(weight.numel() / statistics.median(seconds) / 1e9, 3)


if __name__ == "__main__":
    main()
