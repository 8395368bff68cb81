"""The low-rank update of one site for all slots of a batch: y = W x + s B A x, with s, A and B by row.

`reference` is the plain form that autograd differentiates. `low_rank` is the form in use: one `autograd.Function` a
site that saves the input and the rank-wide intermediate, never a dense delta, and never asks for a gradient of W.

Where factors are anchored to their start, the update is s (B A - B0 A0), computed as s ((B - B0) A + B0 (A - A0)): the
differences are taken in float32, so both terms are exactly zero at the start, and what is learned is no small
difference of two large products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from manylora.ops.dropout import dropout_mask
from manylora.ops.groups import Block, Grouping, grouping, index_of
from manylora.ops.rounding import fake_quantised
from manylora.types import Segment, Site, Stack, Use


def segment_mask(segment: Segment, stack: Stack, like: Tensor) -> Tensor | None:
    """What dropout multiplies a segment's input by, (n, I) as `like` (..., I); None where dropout is off."""
    probability = stack.dropouts[segment.place]
    if probability == 0.0 or segment.parts[0][2] is None:
        return None
    masks = [
        dropout_mask(stream, stack.site.name, (stop - start, like.shape[-1]), probability, like)
        for start, stop, stream in segment.parts
        if stream is not None
    ]
    return masks[0] if len(masks) == 1 else torch.cat(masks)


def widened(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 2R, I) and (..., O, 2R) whose product is B A - B0 A0, exactly zero where A = A0 and B = B0."""
    return torch.cat([a, a - a0], dim=-2), torch.cat([b - b0, b0], dim=-1)


def reference(x: Tensor, site: Site, uses: Sequence[Use], base: Callable[[Tensor], Tensor]) -> Tensor:
    """The update in plain autograd: (..., I) to (..., O). Slow, and the truth that the fast form is tested against.

    Semantics: `y[i] = base(x[i]) + scale[p(i)] * (dropout(x[i]) @ a[p(i)].T) @ b[p(i)].T`, less the same of anchors.
    """
    y = base(x)
    flat = x.reshape(-1, x.shape[-1])
    out = y.reshape(flat.shape[0], -1)
    for use in uses:
        for segment in use.runs.segments:
            a, b = use.stack.tensors["a"][segment.place], use.stack.tensors["b"][segment.place]
            a, b = fake_quantised(a, b, use.stack.rounding)
            part = flat[segment.start : segment.stop]
            mask = segment_mask(segment, use.stack, part)
            part = part if mask is None else part * mask
            update = use.stack.scales[segment.place] * (part @ a.to(x.dtype).t()) @ b.to(x.dtype).t()
            if use.stack.anchors:
                a0, b0 = use.stack.anchors["a"][segment.place], use.stack.anchors["b"][segment.place]
                update = update - use.stack.scales[segment.place] * (part @ a0.to(x.dtype).t()) @ b0.to(x.dtype).t()
            below = torch.zeros(segment.start, out.shape[-1], dtype=out.dtype, device=out.device)
            above = torch.zeros(flat.shape[0] - segment.stop, out.shape[-1], dtype=out.dtype, device=out.device)
            out = out + torch.cat([below, update.to(out.dtype), above])
    return out.view(y.shape)


@dataclass(frozen=True, slots=True)
class _Call:
    """What one application of the Function needs beside tensors."""

    site: Site
    uses: Sequence[Use]
    with_base: bool
    extra: tuple[tuple, dict]


class _LowRank(torch.autograd.Function):
    """Saves x (n, I) and t = s x A^T (G, length, R; 2R with anchors) of each block; gradients for x, every a and b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *factors: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if call.with_base:
            y = call.site.map(x, *call.extra[0], **call.extra[1])
        else:
            y = x.new_zeros(*x.shape[:-1], call.site.out_in[0])
        out = y.view(flat.shape[0], -1)
        middles: list[Tensor] = []
        for use, held, parts in _by_use(call.uses, factors):
            for block, a, b in _cast(held, use.stack, parts, x.dtype):
                part, _ = _dropped(block, use.stack, flat)
                middle = _scaled(torch.bmm(part, a.transpose(1, 2)), block, use.stack)
                block.add_product(out, middle, b.transpose(1, 2))
                middles.append(middle)
        ctx.call, ctx.shape = call, x.shape
        ctx.num_factors = len(factors)
        ctx.save_for_backward(flat, *middles, *factors)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (grad,) = grad_outputs
        call: _Call = ctx.call
        saved = ctx.saved_tensors
        flat, middles, factors = saved[0], iter(saved[1 : -ctx.num_factors]), saved[-ctx.num_factors :]
        grad_flat = grad.reshape(flat.shape[0], -1)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_flat @ call.site.weight(grad.dtype) if call.with_base else torch.zeros_like(flat)
        grads: list[Tensor | None] = []
        for use, held, parts in _by_use(call.uses, factors):
            rank = held[0].shape[1]
            of_a: list[Tensor] = []
            of_b: list[Tensor] = []
            for block, a, b in _cast(held, use.stack, parts, grad.dtype):
                part, mask = _dropped(block, use.stack, flat)
                gy = block.take_gradient(grad_flat)
                back = _scaled(torch.bmm(gy, b), block, use.stack)
                of_a.append(torch.bmm(_of_a(back, rank).transpose(1, 2), part))
                of_b.append(torch.bmm(gy.transpose(1, 2), next(middles)[..., :rank]))
                if grad_x is not None:
                    block.add_product(grad_x, back, a, mask)
            grads += [
                _stacked(held[0], parts.blocks, of_a),
                _stacked(held[1], parts.blocks, of_b),
                *(None for _ in held[2:]),
            ]
        return (None if grad_x is None else grad_x.view(ctx.shape), None, *grads)


def _held(use: Use) -> tuple[Tensor, ...]:
    """a and b of a stack, and their anchors where it has any."""
    stack = use.stack
    anchors = (stack.anchors["a"], stack.anchors["b"]) if stack.anchors else ()
    return stack.tensors["a"], stack.tensors["b"], *anchors


def _by_use(uses: Sequence[Use], factors: Sequence[Tensor]) -> Iterator[tuple[Use, Sequence[Tensor], Grouping]]:
    """Each use with its share of what `_held` gave for all of them, and its blocks."""
    reached = 0
    for use in uses:
        count = 4 if use.stack.anchors else 2
        yield use, factors[reached : reached + count], grouping(use.runs)
        reached += count


def _of_a(back: Tensor, rank: int) -> Tensor:
    """The gradient's rank-wide intermediate for a, which stands in both halves of an anchored update."""
    return back if back.shape[-1] == rank else back[..., :rank] + back[..., rank:]


def _cast(
    held: Sequence[Tensor], stack: Stack, parts: Grouping, dtype: torch.dtype
) -> Iterator[tuple[Block, Tensor, Tensor]]:
    """Each block with a (G, R, I) and b (G, O, R) of its groups in the compute dtype.

    The float32 masters of the places in use are cast once for all blocks, in forward and again in backward: to keep
    them in between would take half of the factors' size and save a hundredth of a step.

    With anchors both are 2R wide. On a grid, the masters are rounded to it; nothing of them lies beyond its ends, so
    the gradients of what is used here are those of the masters, straight through.
    """
    picked = [parts.used.of_stack(tensor) for tensor in held]
    a, b = widened(*picked) if len(picked) == 4 else fake_quantised(picked[0], picked[1], stack.rounding)
    a, b = a.to(dtype), b.to(dtype)
    for block, own in zip(parts.blocks, parts.own, strict=True):
        yield block, own.of_stack(a), own.of_stack(b)


def _stacked(like: Tensor, parts: list[Block], products: list[Tensor]) -> Tensor:
    """The gradient of a whole stack from the products (G, ...) of its blocks; groups of one place are added up."""
    if len(parts) == 1 and parts[0].places == tuple(range(len(like))):
        return products[0].to(like.dtype)
    total = torch.zeros_like(like)
    for block, product in zip(parts, products, strict=True):
        if len(block.places) == 1:
            total[block.places[0]].add_(product[0])
        else:
            total.index_add_(0, index_of(block.places, like.device), product.to(like.dtype))
    return total


def _scaled(middle: Tensor, block: Block, stack: Stack) -> Tensor:
    """A rank-wide intermediate (G, length, R) times the scale of each group, in place."""
    scales = tuple(stack.scales[place] for place in block.places)
    if len(set(scales)) == 1:
        return middle.mul_(scales[0])
    return middle.mul_(_column(scales, torch.promote_types(middle.dtype, torch.float32), middle.device))


@lru_cache(maxsize=256)
def _column(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


def _dropped(block: Block, stack: Stack, flat: Tensor) -> tuple[Tensor, Tensor | None]:
    """A block's items (G, length, C) after dropout, and the mask by which they were multiplied (None: it is off)."""
    part = block.take(flat)
    if not any(stack.dropouts):
        return part, None
    masks = [segment_mask(segment, stack, flat) for segment in block.segments]
    if all(mask is None for mask in masks):
        return part, None
    filled = []
    for segment, mask in zip(block.segments, masks, strict=True):
        size = segment.stop - segment.start
        mask = flat.new_ones(size, flat.shape[1]) if mask is None else mask
        filled.append(functional.pad(mask, (0, 0, 0, -size % block.length)))
    mask = filled[0] if len(filled) == 1 else torch.cat(filled)
    mask = mask.view(part.shape)
    return part * mask, mask


def low_rank(
    x: Tensor, site: Site, uses: Sequence[Use], *, with_base: bool, extra: tuple[tuple, dict] = ((), {})
) -> Tensor:
    """(..., I) to (..., O): the base product on the whole batch in its order plus each segment's update.

    With `with_base` false, only the update (zero where no segment reaches). Ranges that no segment names are the bare
    base. The factors are cast to x's dtype; gradients reach them in their own.
    """
    factors = [tensor for use in uses for tensor in _held(use)]
    result: Tensor = _LowRank.apply(x, _Call(site, uses, with_base, extra), *factors)
    return result
