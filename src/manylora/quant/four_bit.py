"""What `nf4` and `fp4` share: sixteen values, a scale per block, and optionally scales that are quantised too."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from manylora.errors import BaseBroken, ConfigError
from manylora.quant import kernels, plain
from manylora.quant.checks import Stored, check_dense_dtype, check_options, checked_flag, checked_weight, short_dtype
from manylora.quant.codebooks import NESTED_BLOCK, codebook, nested_values
from manylora.quant.nested import Nested

BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True, eq=False)
class FourBit:
    """A (O, I) weight of N = O x I values in four bits each.

    `codes` is uint8 (ceil(N / 2),), the even weight in the high nibble. `absmax` is float32 (ceil(N / block),), the
    largest magnitude of each block of neighbours in row-major order; None where only `nested` holds it. `source_dtype`
    is the dtype of the weight that was packed, which bitsandbytes writes down and makes dense in.
    """

    format: str
    shape: tuple[int, int]
    block: int
    codes: Tensor
    absmax: Tensor | None
    nested: Nested | None
    source_dtype: torch.dtype

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight that the codes stand for, (O, I), contiguous, new each time.

        Products are float32 and rounded once to `dtype`; no float32 copy of the whole exists.

        Raises:
            ConfigError: a dtype that is not floating, or of eight bits.
        """
        check_dense_dtype(dtype)
        rows, columns = self.shape
        count = rows * columns
        scales = self.scales()
        whole = count - count % self.block
        dense = None
        if whole and kernels.runs(self.codes.device, dtype, self.block):
            blocks = whole // self.block
            dense = kernels.dequantise(self.codes[: whole // 2], scales[:blocks], self.block, self.format, dtype)
            if whole == count:
                return dense.view(self.shape)
        out = torch.empty(count, dtype=dtype, device=self.codes.device)
        done = 0
        if dense is not None:
            out[:whole] = dense.view(-1)
            done = whole
        book = codebook(self.format, self.codes.device)
        plain.dequantise(self.codes[done // 2 :], scales[done // self.block :], self.block, book, out[done:])
        return out.view(self.shape)

    def scales(self) -> Tensor:
        """The float32 scale of each block, (ceil(N / block),): as held, or unfolded for this once."""
        if self.absmax is not None:
            return self.absmax
        if self.nested is None:
            raise AssertionError("a four-bit weight without scales")
        return self.nested.unfold()

    def unfold(self) -> FourBit:
        """The same weight with its scales in float32 beside the nested ones, which stay what is written to disk."""
        return self if self.absmax is not None else replace(self, absmax=self.scales())

    def tensors(self) -> dict[str, Tensor]:
        """What is written to disk, under bitsandbytes' names but for `codes`, which it calls the weight itself."""
        values = codebook(self.format, self.codes.device).values
        if self.nested is None:
            return {"codes": self.codes, "absmax": self.scales(), "quant_map": values}
        nested = {"nested_absmax": self.nested.absmax, "nested_quant_map": self.nested.table()}
        return {"codes": self.codes, "absmax": self.nested.codes, "quant_map": values, **nested}

    def settings(self) -> dict[str, Any]:
        """The rest of what is written to disk, as JSON."""
        settings: dict[str, Any] = {
            "format": self.format,
            "shape": list(self.shape),
            "block": self.block,
            "dtype": short_dtype(self.source_dtype),
            "double_quant": self.nested is not None,
        }
        if self.nested is not None:
            settings |= {"nested_block": NESTED_BLOCK, "nested_offset": self.nested.offset}
        return settings

    def nbytes(self) -> int:
        """Bytes held: codes, scales, and both forms of the scales once unfolded. The shared tables are not counted."""
        scales = 0 if self.absmax is None else self.absmax.nbytes
        return self.codes.nbytes + scales + (0 if self.nested is None else self.nested.nbytes())

    def bits(self) -> float:
        """Bits per weight of what is written: codes and scales, without what does not grow (tables, the offset)."""
        scales = self.scales().nbytes if self.nested is None else self.nested.codes.nbytes + self.nested.absmax.nbytes
        return 8 * (self.codes.nbytes + scales) / (self.shape[0] * self.shape[1])

    def to(self, device: torch.device | str) -> FourBit:
        """The same codes on a device."""
        absmax = None if self.absmax is None else self.absmax.to(device)
        nested = None if self.nested is None else self.nested.to(device)
        return replace(self, codes=self.codes.to(device), absmax=absmax, nested=nested)


@dataclass(slots=True)
class FourBitFormat:
    """`nf4` or `fp4`: the same bytes as bitsandbytes 0.50 on the CPU, on every device.

    Codes are made by plain torch operations everywhere, so that a device does not change them: bitsandbytes' own CUDA
    kernels give other codes to blocks of zeros and to some scales.
    """

    name: str

    def pack(self, weight: Tensor, **options: Any) -> FourBit:
        """Round a (O, I) weight. Options: `block` (64), `double_quant` (True).

        Values are read as float32. Bits per weight at block 64: 4.5, and 4.127 with scales that are quantised too.

        Raises:
            UnknownName: another option.
            ConfigError: a block that bitsandbytes does not know.
            PackError: a weight that is not 2-D, not floating, empty or not finite.
        """
        check_options(options, ("block", "double_quant"), self.name)
        block = _checked_block(options.get("block", 64), self.name)
        double_quant = checked_flag(options.get("double_quant", True), "double_quant", self.name)
        weight = checked_weight(weight, self.name)
        rows, columns = weight.shape
        codes, absmax = plain.quantise(weight, block, codebook(self.name, weight.device), self.name)
        nested = Nested.fold(absmax) if double_quant else None
        # bitsandbytes knows no float64; the codes are those of the weight as float32.
        source = torch.float32 if weight.dtype == torch.float64 else weight.dtype
        return FourBit(self.name, (rows, columns), block, codes, None if nested else absmax, nested, source)

    def from_tensors(self, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> FourBit:
        """A packed weight again.

        Raises:
            BaseBroken: a tensor or setting is missing, unexpected or misshapen, or the table is not this format's.
        """
        stored = Stored(self.name, tensors, settings)
        rows, columns = stored.shape()
        block = stored.setting("block", int)
        if block not in BLOCKS:
            raise BaseBroken(f"setting 'block' of the {self.name} weight is {block}", allowed=_known_blocks())
        source = stored.setting("dtype", str)
        if source not in ("float32", "bfloat16", "float16"):
            raise BaseBroken(
                f"setting 'dtype' of the {self.name} weight is {source!r}", allowed="float32, bfloat16, float16"
            )
        count = rows * columns
        blocks = -(-count // block)
        codes = stored.tensor("codes", torch.uint8, ((count + 1) // 2,))
        values = stored.tensor("quant_map", torch.float32, (16,))
        if not torch.equal(values, codebook(self.name, values.device).values):
            found = ", ".join(f"{value:.4g}" for value in values.tolist())
            raise BaseBroken(f"the quant_map of the {self.name} weight is not {self.name}'s: {found}")
        absmax, nested = None, None
        if stored.setting("double_quant", bool):
            nested = _stored_nested(stored, blocks, self.name)
        else:
            absmax = stored.tensor("absmax", torch.float32, (blocks,))
        stored.done()
        return FourBit(self.name, (rows, columns), block, codes, absmax, nested, getattr(torch, source))


def _stored_nested(stored: Stored, blocks: int, name: str) -> Nested:
    size = stored.setting("nested_block", int)
    if size != NESTED_BLOCK:
        raise BaseBroken(f"setting 'nested_block' of the {name} weight is {size}", allowed=str(NESTED_BLOCK))
    codes = stored.tensor("absmax", torch.uint8, (blocks,))
    absmax = stored.tensor("nested_absmax", torch.float32, (-(-blocks // NESTED_BLOCK),))
    values = stored.tensor("nested_quant_map", torch.float32, (256,))
    offset = float(stored.setting("nested_offset", float, int))
    if not abs(offset) < float("inf"):
        raise BaseBroken(f"setting 'nested_offset' of the {name} weight is {offset}", allowed="a finite number")
    # Older releases of bitsandbytes wrote -1 as the first value; what a file says is what its codes stand for.
    usual = torch.equal(values, nested_values(values.device))
    return Nested(codes, absmax, offset, None if usual else values)


def _checked_block(block: Any, name: str) -> int:
    if isinstance(block, bool) or block not in BLOCKS:
        raise ConfigError(f"block of {name} is {block!r}", allowed=_known_blocks())
    return int(block)


def _known_blocks() -> str:
    return ", ".join(map(str, BLOCKS))


NF4 = FourBitFormat("nf4")
"""Sixteen values that are quantiles of the normal distribution; bitsandbytes' bytes.

Source: QLoRA (arXiv 2305.14314), section 3.
"""

FP4 = FourBitFormat("fp4")
"""A small floating-point number (sign, two bits of exponent, one of fraction); bitsandbytes' bytes.

Two codes stand for zero, so a dense weight packed again may take the other one; the values do not change.
"""
