"""How a merged weight is kept: as numbers of 16 or 32 bits, or packed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.errors import UnknownName, nearest_names
from manylora.quant import PACKINGS
from manylora.types import PackFormat

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_LONG_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True, slots=True)
class Storage:
    """One way to keep weights. `dtype` of floating storage; `packing` where linear maps are packed."""

    name: str
    dtype: torch.dtype | None = None
    packing: PackFormat | None = None

    def dtype_for(self, own: torch.dtype, main: torch.dtype) -> torch.dtype:
        """The dtype of a tensor that is not packed, `own` in a checkpoint that is mostly `main`.

        Tensors that the checkpoint keeps wider than the rest (a router's bias) stay so.
        """
        if self.dtype is None or not own.is_floating_point:
            return own
        return self.dtype if own == main or torch.promote_types(own, self.dtype) == self.dtype else own

    def kept(self, value: Tensor, own: torch.dtype, main: torch.dtype, *, packs: bool) -> Tensor:
        """What a reader gets back of a value, in the value's own dtype."""
        if self.packing is not None and packs:
            return self.packing.pack(value.contiguous()).dense(value.dtype)
        return value.to(self.dtype_for(own, main)).to(value.dtype)


def storage_of(name: str) -> Storage:
    """The storage of a name: fp32, bf16, fp16, or a packing.

    Raises:
        UnknownName: there is no such storage.
    """
    name = str(name).removeprefix("torch.")  # as people pass it in Python: torch.bfloat16
    name = _LONG_NAMES.get(name, name)
    if name in FLOATS:
        return Storage(name, dtype=FLOATS[name])
    if name in PACKINGS:
        return Storage(name, packing=PACKINGS.get(name))
    known = [*FLOATS, *PACKINGS]
    raise UnknownName(f"nothing is stored as {name!r}", nearest=nearest_names(name, known), allowed=", ".join(known))
