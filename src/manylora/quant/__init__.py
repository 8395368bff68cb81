"""How a frozen weight is stored in few bits; one file a format, one line in this table.

A format rounds a (O, I) weight to codes and scales and gives a dense weight back. `nf4` and `fp4` write what
bitsandbytes writes; `int8` and `int4` are evenly spaced. Nothing here happens by itself: a weight is packed because
someone called `pack`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from manylora.errors import PackError
from manylora.quant.kernels import backend
from manylora.table import Table
from manylora.types import Packed, PackFormat

PACKINGS: Table[PackFormat] = Table(
    "storage format",
    {
        "nf4": "manylora.quant.four_bit:NF4",
        "fp4": "manylora.quant.four_bit:FP4",
        "int8": "manylora.quant.int8:INT8",
        "int4": "manylora.quant.int4:INT4",
    },
)

__all__ = ["PACKINGS", "PackError", "backend", "from_tensors", "pack", "unfold"]


def pack(weight: Tensor, format: str, **options: Any) -> Packed:  # noqa: A002 (the word that users write)
    """A weight in a storage format: new codes and scales on the weight's device; the weight is left as it is.

    `weight` is (O, I) in float64, float32, bfloat16 or float16; it is read as float32. Options: `block` and
    `double_quant` (nf4, fp4), `block` (int8), `block` and `symmetric` (int4). Scratch memory is a few MiB, and once the
    weight where it is not contiguous.

    Raises:
        UnknownName: no such format, or an option that this format does not have.
        ConfigError: an option out of range.
        PackError: a weight that is not 2-D, not floating, empty, or not finite (with the place).
    """
    return PACKINGS.get(format).pack(weight, **options)


def from_tensors(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Packed:
    """A packed weight again, from what its `tensors()` and `settings()` gave.

    Raises:
        UnknownName: `settings["format"]` names no format.
        BaseBroken: a tensor or a setting is missing, unexpected or misshapen.
    """
    return PACKINGS.get(str(settings.get("format"))).from_tensors(tensors, settings)


def unfold(packed: Packed) -> Packed:
    """The same weight with scales that were themselves quantised held as float32: quicker to make dense, and larger.

    Only the form in memory changes (`nbytes()`); what is written to disk stays as it was. A weight whose scales are
    plain is returned as it is.
    """
    unfolded = getattr(packed, "unfold", None)
    return unfolded() if unfolded is not None else packed
