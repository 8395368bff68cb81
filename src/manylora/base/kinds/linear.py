"""A product of items with a matrix, which lies as (out, in), or as (in, out) in transformers' `Conv1D`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from manylora.base.packing.linear import PackedLinear


class Linear:
    """`nn.Linear`: weight (O, I)."""

    name = "linear"
    maps = True
    product = True
    transposed = False
    drops_input = True
    zero_factor = "b"
    stored: Mapping[str, str] = {"a": "lora_A.weight", "b": "lora_B.weight"}
    stored_dims = 2

    def recognises(self, module: nn.Module) -> bool | None:
        if isinstance(module, PackedLinear):
            return None if module.transposed else True
        return type(module).forward is nn.Linear.forward if isinstance(module, nn.Linear) else None

    def as_map(self, weight: Tensor) -> Tensor:
        return weight.t() if self.transposed else weight

    def as_own(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.t() if self.transposed else matrix

    def out_in(self, shape: tuple[int, ...]) -> tuple[int, int]:
        rows, columns = shape
        return (columns, rows) if self.transposed else (rows, columns)

    def factor_shapes(self, shape: tuple[int, ...], rank: int) -> Mapping[str, tuple[int, ...]]:
        rows, columns = self.out_in(shape)
        return {"a": (rank, columns), "b": (rows, rank)}

    def items(self, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    def num_items(self, x: Tensor) -> int:
        return x.numel() // x.shape[-1]

    def low_rank(self, items: Tensor, a: Tensor, b: Tensor, scale: float, module: nn.Module) -> Tensor:
        return scale * (items @ a.to(items.dtype).t()) @ b.to(items.dtype).t()


class Conv1D(Linear):
    """transformers' `Conv1D` (GPT-2): weight (I, O)."""

    name = "conv1d"
    transposed = True

    def recognises(self, module: nn.Module) -> bool | None:
        if isinstance(module, PackedLinear):
            return True if module.transposed else None
        # Compared by name: importing transformers costs seconds, and a plain torch model never needs it.
        names: list[Any] = [(cls.__module__, cls.__name__) for cls in type(module).__mro__]
        return type(module).__name__ == "Conv1D" if ("transformers.pytorch_utils", "Conv1D") in names else None


LINEAR = Linear()
CONV1D = Conv1D()
