"""Convolutions of one group, padded with zeros: as a map of (out, in), in is a patch of all input channels.

A low-rank change is a convolution to R channels with the module's own kernel, stride and padding, then one of kernel 1
to the outputs: those are the shapes that PEFT gives its factors. Items are whole rows of the batch.

Not recognised: dilated ones, because PEFT's branch leaves the dilation out and would compute another map from the same
factors, and those that pad with anything but zeros, for the same reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from manylora.errors import RouteError


class Convolution:
    """Weight (O, C, *kernel), a (R, C, *kernel), b (O, R, *ones)."""

    maps = True
    product = False
    transposed = False
    drops_input = True
    zero_factor = "b"
    stored: Mapping[str, str] = {"a": "lora_A.weight", "b": "lora_B.weight"}

    def __init__(self, name: str, module: type[nn.Conv1d] | type[nn.Conv2d], convolve: Callable[..., Tensor]):
        self.name = name
        self.stored_dims = 3 if module is nn.Conv1d else 4
        self._module = module
        self._convolve = convolve

    def recognises(self, module: nn.Module) -> bool | None:
        if not isinstance(module, self._module) or module.groups != 1 or module.padding_mode != "zeros":
            return None
        if any(step != 1 for step in module.dilation):
            return None
        return type(module).forward is self._module.forward

    def as_map(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def as_own(self, matrix: Tensor, shape: tuple[int, ...]) -> Tensor:
        return matrix.reshape(shape)

    def out_in(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0], math.prod(shape[1:])

    def factor_shapes(self, shape: tuple[int, ...], rank: int) -> Mapping[str, tuple[int, ...]]:
        return {"a": (rank, *shape[1:]), "b": (shape[0], rank, *(1 for _ in shape[2:]))}

    def items(self, x: Tensor) -> Tensor:
        if x.dim() != self.stored_dims:
            raise RouteError(
                f"a {self._module.__name__} is given {x.dim()} dimensions, so its rows cannot be told apart",
                allowed=f"{self.stored_dims}, rows first",
            )
        return x

    def num_items(self, x: Tensor) -> int:
        return len(self.items(x))

    def low_rank(self, items: Tensor, a: Tensor, b: Tensor, scale: float, module: nn.Module) -> Tensor:
        own: Any = module
        middle = self._convolve(items, a.to(items.dtype), None, own.stride, own.padding)
        return scale * self._convolve(middle, b.to(items.dtype))


CONVOLUTION1D = Convolution("convolution1d", nn.Conv1d, functional.conv1d)
CONVOLUTION2D = Convolution("convolution2d", nn.Conv2d, functional.conv2d)
