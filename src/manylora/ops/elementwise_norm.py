"""RMS norm in few passes over memory: a plain reference, and a form in use that keeps its input and a number a row.

Two kernels serve other ends than their names say. Batch normalisation with given statistics, each row taken for a
channel, divides every row by its root mean square in one pass. And weight normalisation `w = v g / |v|` has the
gradient `(g / |v|) (dw - v (v . dw) / |v|^2)`, which is that of an RMS norm if it is told that the norms are
`sqrt(W (mean(x^2) + eps))` and that g is `sqrt(W)`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from manylora.ops.elementwise import few, memory_order, usable, wide_dtype

ELEMENTS_AT_ONCE = 1 << 20
"""Elements that are widened at one time where a result is rounded once. Measured: smaller blocks cost joins of
threads, and larger ones memory."""


def rms_norm_reference(
    x: Tensor, weight: Tensor | None, eps: float, *, add_one: bool = False, round_once: bool = False
) -> Tensor:
    """(..., W) to (..., W) in plain autograd: rows over their root mean square, times the weight (W,).

    `add_one`: times 1 + weight, always rounded once. Otherwise the row is rounded to x's dtype before it meets the
    weight, unless `round_once`.

    Semantics: `y = x / sqrt(mean(x^2, -1) + eps) * weight`.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, equation 4.
    """
    wide = x.to(wide_dtype(x))
    wide = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    if weight is None:
        return wide.to(x.dtype)
    if add_one or round_once:
        return (wide * (weight.to(wide.dtype) + int(add_one))).to(x.dtype)
    return wide.to(x.dtype) * weight.to(x.dtype)


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, *, add_one: bool = False, round_once: bool = False
) -> Tensor:
    """What `rms_norm_reference` gives, fast; the result lies in memory as x does."""
    if few(x) or not usable(x):
        return rms_norm_reference(x, weight, eps, add_one=add_one, round_once=round_once)
    once = (add_one or round_once) and weight is not None and x.dtype != wide_dtype(x)
    result: Tensor = _RmsNorm.apply(x, weight, eps, add_one, once)
    return result


class _RmsNorm(torch.autograd.Function):
    """Saves x, the weight and a number for each row; gradients for x and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float, add_one: bool, once: bool) -> Tensor:
        order = memory_order(x)
        rows = _rows(x, order)
        means = torch.linalg.vector_norm(rows, dim=-1, dtype=wide_dtype(x)).square_().div_(rows.shape[1])
        if once and weight is not None:
            inverse, scale = (means + eps).rsqrt_().unsqueeze(-1), _scale(weight, add_one, means.dtype)
            made = torch.empty_like(rows)
            for into, part, factor in _blocks(made, rows, inverse):
                into.copy_(part.to(means.dtype).mul_(factor).mul_(scale))
        else:
            zeros = torch.zeros_like(means)
            made = torch.native_batch_norm(rows[None], None, None, zeros, means, False, 0.0, eps)[0][0]
            made = made if weight is None else made.mul_(_scale(weight, add_one, x.dtype))
        norms = means.add_(eps).mul_(rows.shape[1]).sqrt_().unsqueeze(-1)
        ctx.save_for_backward(x, weight, norms)
        ctx.add_one, ctx.once = add_one, once
        return _unrowed(made, x, order)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, norms = ctx.saved_tensors
        order = memory_order(x)
        rows, grad = _rows(x, order), _rows(grad_outputs[0], order)
        wants_x, wants_weight, *_ = ctx.needs_input_grad
        of_x = None
        root = math.sqrt(rows.shape[1])
        # The kernel takes g in x's dtype: what its rounding leaves is multiplied in along with the weight.
        rounded = float(torch.tensor(root, dtype=x.dtype))
        if wants_x and (ctx.once or weight is None):
            scale = None if weight is None else _scale(weight, ctx.add_one, norms.dtype)
            of_x = torch.empty_like(rows)
            for into, part, above, known in _blocks(of_x, rows, grad, norms):
                above = above.to(norms.dtype) if scale is None else above.to(norms.dtype) * scale
                into.copy_(_gradient(above, part.to(norms.dtype), known, root))
        elif wants_x:
            scale = _scale(weight, ctx.add_one, x.dtype)
            above = torch.addcmul(rows.new_zeros(()), grad, scale, value=root / rounded)
            of_x = _gradient(above, rows, norms, rounded)
        of_weight = None
        if wants_weight and weight is not None:
            of_weight = _weight_gradient(rows, grad, norms).to(weight.dtype)
        return None if of_x is None else _unrowed(of_x, x, order), of_weight, None, None, None


def _gradient(above: Tensor, rows: Tensor, norms: Tensor, root: float) -> Tensor:
    """(n, W): `root / norms * (above - rows * sum(rows * above) / norms^2)`."""
    result: Tensor = torch.ops.aten._weight_norm_interface_backward(
        above, rows, rows.new_full((len(rows), 1), root), norms, 0
    )[0]
    return result


def _weight_gradient(rows: Tensor, grad: Tensor, norms: Tensor) -> Tensor:
    """(W,): the sum over rows of the gradient times the normalised row."""
    total = norms.new_zeros(rows.shape[1])
    for part, above, known in _blocks(rows, grad, norms):
        total += above.to(norms.dtype).mul_(part).mul_(math.sqrt(rows.shape[1]) / known).sum(dim=0)
    return total


def _scale(weight: Tensor, add_one: bool, dtype: torch.dtype) -> Tensor:
    return weight.to(dtype) + 1 if add_one else weight.to(dtype)


def _blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each."""
    size = max(1, ELEMENTS_AT_ONCE // tensors[0].shape[1])
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _rows(x: Tensor, order: list[int]) -> Tensor:
    """Contiguous (n, W): a view where x lies densely in that order."""
    return x.permute(order).reshape(-1, x.shape[-1]).contiguous()


def _unrowed(rows: Tensor, like: Tensor, order: list[int]) -> Tensor:
    shape = [like.shape[dim] for dim in order]
    return rows.view(shape).permute([order.index(dim) for dim in range(like.ndim)])
