"""Whatever else owns parameters: only a whole copy can adapt it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn


class Module:
    """A norm, a cell, a convolution in groups: no matrix by which items are multiplied."""

    name = "module"
    maps = False
    product = False
    transposed = False
    drops_input = False
    zero_factor = "b"
    stored: Mapping[str, str] = {}
    stored_dims = 0

    def recognises(self, module: nn.Module) -> bool | None:
        return False

    def as_map(self, weight: Tensor) -> Tensor:
        return weight

    def as_own(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix

    def out_in(self, shape: tuple[int, ...]) -> tuple[int, int]:
        raise TypeError(f"a module of shape {shape} is no map of (out, in)")

    def factor_shapes(self, shape: tuple[int, ...], rank: int) -> Mapping[str, tuple[int, ...]]:
        raise TypeError(f"a module of shape {shape} has no low-rank factors")

    def items(self, x: Tensor) -> Tensor:
        return x

    def num_items(self, x: Tensor) -> int:
        return x.shape[0]

    def low_rank(self, items: Tensor, a: Tensor, b: Tensor, scale: float, module: nn.Module) -> Tensor:
        raise TypeError(f"a {type(module).__name__} has no low-rank factors")


MODULE = Module()
