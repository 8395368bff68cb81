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
from typing import Any

import torch
from torch import Tensor

from manylora.ops.dropout import dropout_mask
from manylora.ops.rounding import fake_quantised
from manylora.types import Segment, Site, Stack, Use


def dropped(x: Tensor, segment: Segment, stack: Stack) -> tuple[Tensor, Tensor | None]:
    """A segment's input (n, I) after dropout, and the mask by which it was multiplied (None: dropout is off)."""
    probability = stack.dropouts[segment.place]
    if probability == 0.0 or segment.parts[0][2] is None:
        return x, None
    masks = [
        dropout_mask(stream, stack.site.name, (stop - start, x.shape[-1]), probability, x)
        for start, stop, stream in segment.parts
        if stream is not None
    ]
    mask = masks[0] if len(masks) == 1 else torch.cat(masks)
    return x * mask, mask


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
        for segment in use.segments:
            a, b = use.stack.tensors["a"][segment.place], use.stack.tensors["b"][segment.place]
            a, b = fake_quantised(a, b, use.stack.rounding)
            part, _ = dropped(flat[segment.start : segment.stop], segment, use.stack)
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


def _equal_groups(use: Use, items: int) -> tuple[list[int], int] | None:
    """Places in the order of the batch and the group length, where a batched product covers the whole batch."""
    segments = use.segments
    length = segments[0].stop - segments[0].start
    if (
        len(segments) < 2
        or length * len(segments) != items
        or len({segment.place for segment in segments}) != len(segments)
    ):
        return None
    if any(s.stop - s.start != length for s in segments) or any(use.stack.dropouts[s.place] for s in segments):
        return None
    return [segment.place for segment in segments], length


class _LowRank(torch.autograd.Function):
    """Saves x (n, I) and t = x A^T (n, R; 2R with anchors) for each use; gradients for x, every a and every b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *factors: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        if call.with_base:
            y = call.site.map(x, *call.extra[0], **call.extra[1])
        else:
            rows = call.site.out_in[0]
            y = x.new_zeros(*x.shape[:-1], rows)
        out = y.view(flat.shape[0], -1)
        middles: list[Tensor] = []
        for use, held in _by_use(call.uses, factors):
            groups = _equal_groups(use, flat.shape[0])
            if groups:
                places, length = groups
                a_cast, b_cast = _cast(held, use.stack, places, x.dtype)
                middle = torch.bmm(flat.view(len(places), length, -1), a_cast.transpose(1, 2))
                out.view(len(places), length, -1).baddbmm_(middle, b_cast.transpose(1, 2))
                middles.append(middle)
                continue
            for segment in use.segments:
                a_cast, b_cast = _cast(held, use.stack, [segment.place], x.dtype)
                part, _ = dropped(flat[segment.start : segment.stop], segment, use.stack)
                middle = part @ a_cast[0].t()
                out[segment.start : segment.stop].addmm_(middle, b_cast[0].t())
                middles.append(middle)
        ctx.call = call
        ctx.shape = x.shape
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
        flat, middles, factors = saved[0], list(saved[1 : -ctx.num_factors]), saved[-ctx.num_factors :]
        grad_flat = grad.reshape(flat.shape[0], -1)
        wants_x = ctx.needs_input_grad[0]
        grad_x = None
        if wants_x:
            grad_x = grad_flat @ call.site.weight(grad.dtype) if call.with_base else torch.zeros_like(flat)
        grads: list[Tensor | None] = []
        for use, held in _by_use(call.uses, factors):
            a, b, *anchors = held
            rank = a.shape[1]
            grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
            grads += [grad_a, grad_b, *(None for _ in anchors)]
            groups = _equal_groups(use, flat.shape[0])
            if groups:
                places, length = groups
                a_cast, b_cast = _cast(held, use.stack, places, grad.dtype)
                gy, x = grad_flat.view(len(places), length, -1), flat.view(len(places), length, -1)
                middle = middles.pop(0)
                back = torch.bmm(gy, b_cast)
                grad_a[places] = torch.bmm(_of_a(back, rank).transpose(1, 2), x).to(a.dtype)
                scales = torch.tensor([use.stack.scales[p] for p in places], dtype=b.dtype, device=b.device)
                grad_b[places] = torch.bmm(gy.transpose(1, 2), middle[..., :rank]).to(b.dtype) * scales[:, None, None]
                if grad_x is not None:
                    grad_x.view(len(places), length, -1).baddbmm_(back, a_cast)
                continue
            for segment in use.segments:
                a_cast, b_cast = _cast(held, use.stack, [segment.place], grad.dtype)
                gy = grad_flat[segment.start : segment.stop]
                x, mask = dropped(flat[segment.start : segment.stop], segment, use.stack)
                back = gy @ b_cast[0]
                grad_a[segment.place] += _of_a(back, rank).t() @ x
                middle = middles.pop(0)[:, :rank]
                grad_b[segment.place] += (gy.t() @ middle).to(b.dtype) * use.stack.scales[segment.place]
                if grad_x is not None and mask is None:
                    grad_x[segment.start : segment.stop].addmm_(back, a_cast[0])
                elif grad_x is not None and mask is not None:
                    grad_x[segment.start : segment.stop] += (back @ a_cast[0]) * mask
        return (None if grad_x is None else grad_x.view(ctx.shape), None, *grads)


def _held(use: Use) -> tuple[Tensor, ...]:
    """a and b of a stack, and their anchors where it has any."""
    stack = use.stack
    anchors = (stack.anchors["a"], stack.anchors["b"]) if stack.anchors else ()
    return stack.tensors["a"], stack.tensors["b"], *anchors


def _by_use(uses: Sequence[Use], factors: Sequence[Tensor]) -> Iterator[tuple[Use, Sequence[Tensor]]]:
    """Each use with its share of what `_held` gave for all of them."""
    reached = 0
    for use in uses:
        count = 4 if use.stack.anchors else 2
        yield use, factors[reached : reached + count]
        reached += count


def _of_a(back: Tensor, rank: int) -> Tensor:
    """The gradient's rank-wide intermediate for a, which stands in both halves of an anchored update."""
    return back if back.shape[-1] == rank else back[..., :rank] + back[..., rank:]


def _cast(held: Sequence[Tensor], stack: Stack, places: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a (G, R, I) and s b (G, O, R) of the places in the compute dtype: the float32 masters are cast at each use.

    With anchors both are 2R wide. On a grid, the masters are rounded to it; nothing of them lies beyond its ends, so
    the gradients of what is used here are those of the masters, straight through.
    """
    picked = held if places == list(range(held[0].shape[0])) else [tensor[places] for tensor in held]
    a, b = widened(*picked) if len(picked) == 4 else fake_quantised(picked[0], picked[1], stack.rounding)
    scales = torch.tensor([stack.scales[place] for place in places], dtype=b.dtype, device=b.device)
    return a.to(dtype), (b * scales[:, None, None]).to(dtype)


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
