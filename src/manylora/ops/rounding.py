"""Factors on a grid of few bits, and the straight-through gradient with which they are trained there.

Semantics: x^ = round(s x) / s, half to even, s = largest / max |x|; |x - x^| <= 1 / (2 s). s is the inverse of the
step, and what is kept is the step 1 / s.

The step is a bfloat16 number. A code times it is then exact in float32, and the largest value of a group has the
largest code whichever way its step was rounded; so numbers that lie on a grid are found on the same grid again, and
what was trained is what is stored. Nothing lies outside of a grid whose step comes from the numbers themselves: the
limits of `straight_through` are for a step that is given.

Source: the estimator: 1308.3432, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes -largest..largest, with a step for each row, or for each `group` of neighbours in a row."""

    largest: int
    group: int | None = None

    def steps(self, x: Tensor) -> Tensor:
        """The steps (..., n_groups) of rows (..., n), bfloat16; 0 where all of a group is 0."""
        size = self._size(x.shape[-1])
        # A product with the constant, which every device rounds alike; division by a number is not the same everywhere.
        groups = functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
        return (groups.abs().amax(-1) * (1.0 / self.largest)).to(torch.bfloat16)

    def spread(self, steps: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """The step of each of a row's numbers, (..., columns); one (..., 1) where a row has one."""
        if steps.shape[-1] == 1:
            return steps.to(dtype)
        return steps.to(dtype).repeat_interleave(self._size(columns), dim=-1)[..., :columns]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 (..., n) and steps (..., n_groups) of rows (..., n)."""
        steps = self.steps(x)
        return _codes(x, self.spread(steps, x.shape[-1], x.dtype), self.largest).to(torch.int8), steps

    def decode(self, codes: Tensor, steps: Tensor) -> Tensor:
        """The float32 numbers of codes, exactly."""
        return codes.float() * self.spread(steps, codes.shape[-1], torch.float32)

    def rounded(self, x: Tensor) -> Tensor:
        """What rows (..., n) are on the grid; the gradient passes straight through to x."""
        steps = self.spread(self.steps(x.detach()), x.shape[-1], x.dtype)
        return straight_through(x, steps, self.largest)

    def _size(self, columns: int) -> int:
        return min(self.group or columns, columns)


INT8 = Grid(largest=127)
"""One step for each row of A and each column of B: a rank-1 component is one scale times whole numbers, exactly."""
INT4 = Grid(largest=7, group=64)
"""Groups of 64 cost a quarter of a bit; of Gaussian numbers they keep 11 % error, a whole row of 4096 keeps 16 %."""
GRIDS = {"int8": INT8, "int4": INT4}


def fake_quantised(a: Tensor, b: Tensor, scheme: str | None) -> tuple[Tensor, Tensor]:
    """A (..., R, I) and B (..., O, R) as `scheme` stores them (None: as they are); gradients reach both unchanged.

    Rounding runs along the rows of A and the columns of B, so a component of zeros (padding) stays zero.
    """
    if scheme is None:
        return a, b
    grid = GRIDS[scheme]
    return grid.rounded(a), grid.rounded(b.transpose(-1, -2)).transpose(-1, -2)


def straight_through(x: Tensor, step: Tensor, largest: int) -> Tensor:
    """x on the grid of a given step; the gradient is 1 where a code reaches x, 0 beyond, and the step gets none.

    Semantics: forward `step * clip(round(x / step), -largest, largest)`; backward that of
    `clip(x, -limit, limit)` with `limit = (largest + 1/2) * step`.
    """
    result: Tensor = _StraightThrough.apply(x, step, largest)
    return result


class _StraightThrough(torch.autograd.Function):
    """Saves which numbers lie within reach."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, step: Tensor, largest: int) -> Tensor:
        ctx.save_for_backward(x.abs() <= (largest + 0.5) * step)
        return _codes(x, step, largest) * step

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, None, None]:
        (inside,) = ctx.saved_tensors
        return grad_outputs[0] * inside, None, None


def _codes(x: Tensor, step: Tensor, largest: int) -> Tensor:
    return (x / step.masked_fill(step == 0, 1.0)).round().clamp(-largest, largest)
