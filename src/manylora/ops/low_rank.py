"""The low-rank update of one site for all slots of a batch: y = W x + s B A x, with s, A and B by row.

`reference` is the plain form that autograd differentiates. `low_rank` is the form in use: one `autograd.Function` a
site that saves the input and the rank-wide intermediate, never a dense delta, and never asks for a gradient of W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manylora.ops.dropout import dropout_mask
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


def reference(x: Tensor, site: Site, uses: Sequence[Use], base: Callable[[Tensor], Tensor]) -> Tensor:
    """The update in plain autograd: (..., I) to (..., O). Slow, and the truth that the fast form is tested against.

    Semantics: `y[i] = base(x[i]) + scale[p(i)] * (dropout(x[i]) @ a[p(i)].T) @ b[p(i)].T`.
    """
    y = base(x)
    flat = x.reshape(-1, x.shape[-1])
    out = y.reshape(flat.shape[0], -1)
    for use in uses:
        for segment in use.segments:
            a, b = use.stack.tensors["a"][segment.place], use.stack.tensors["b"][segment.place]
            part, _ = dropped(flat[segment.start : segment.stop], segment, use.stack)
            update = use.stack.scales[segment.place] * (part @ a.to(x.dtype).t()) @ b.to(x.dtype).t()
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
    """Saves x (n, I) and t = x A^T (n, R) for each use; gradients for x, every a and every b."""

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
        for index, use in enumerate(call.uses):
            a, b = factors[2 * index], factors[2 * index + 1]
            groups = _equal_groups(use, flat.shape[0])
            if groups:
                places, length = groups
                a_cast, b_cast = _cast(a, b, use.stack, places, x.dtype)
                middle = torch.bmm(flat.view(len(places), length, -1), a_cast.transpose(1, 2))
                out.view(len(places), length, -1).baddbmm_(middle, b_cast.transpose(1, 2))
                middles.append(middle)
                continue
            for segment in use.segments:
                a_cast, b_cast = _cast(a, b, use.stack, [segment.place], x.dtype)
                part, _ = dropped(flat[segment.start : segment.stop], segment, use.stack)
                middle = part @ a_cast[0].t()
                out[segment.start : segment.stop].addmm_(middle, b_cast[0].t())
                middles.append(middle)
        ctx.call = call
        ctx.shape = x.shape
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
        flat, middles, factors = saved[0], list(saved[1 : -2 * len(call.uses)]), saved[-2 * len(call.uses) :]
        grad_flat = grad.reshape(flat.shape[0], -1)
        wants_x = ctx.needs_input_grad[0]
        grad_x = None
        if wants_x:
            grad_x = grad_flat @ call.site.weight().to(grad.dtype) if call.with_base else torch.zeros_like(flat)
        grads: list[Tensor] = []
        for index, use in enumerate(call.uses):
            a, b = factors[2 * index], factors[2 * index + 1]
            grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
            groups = _equal_groups(use, flat.shape[0])
            if groups:
                places, length = groups
                a_cast, b_cast = _cast(a, b, use.stack, places, grad.dtype)
                gy, x = grad_flat.view(len(places), length, -1), flat.view(len(places), length, -1)
                middle = middles.pop(0)
                back = torch.bmm(gy, b_cast)
                grad_a[places] = torch.bmm(back.transpose(1, 2), x).to(a.dtype)
                scales = torch.tensor([use.stack.scales[p] for p in places], dtype=b.dtype, device=b.device)
                grad_b[places] = torch.bmm(gy.transpose(1, 2), middle).to(b.dtype) * scales[:, None, None]
                if grad_x is not None:
                    grad_x.view(len(places), length, -1).baddbmm_(back, a_cast)
                grads += [grad_a, grad_b]
                continue
            for segment in use.segments:
                a_cast, b_cast = _cast(a, b, use.stack, [segment.place], grad.dtype)
                gy = grad_flat[segment.start : segment.stop]
                x, mask = dropped(flat[segment.start : segment.stop], segment, use.stack)
                back = gy @ b_cast[0]
                grad_a[segment.place] += back.t() @ x
                grad_b[segment.place] += (gy.t() @ middles.pop(0)).to(b.dtype) * use.stack.scales[segment.place]
                if grad_x is not None and mask is None:
                    grad_x[segment.start : segment.stop].addmm_(back, a_cast[0])
                elif grad_x is not None and mask is not None:
                    grad_x[segment.start : segment.stop] += (back @ a_cast[0]) * mask
            grads += [grad_a, grad_b]
        return (None if grad_x is None else grad_x.view(ctx.shape), None, *grads)


def _cast(a: Tensor, b: Tensor, stack: Stack, places: list[int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """a (G, R, I) and s b (G, O, R) of the places in the compute dtype: the float32 masters are cast at each use."""
    if places == list(range(a.shape[0])):
        picked_a, picked_b = a, b
    else:
        picked_a, picked_b = a[places], b[places]
    scales = torch.tensor([stack.scales[place] for place in places], dtype=b.dtype, device=b.device)
    return picked_a.to(dtype), (picked_b * scales[:, None, None]).to(dtype)


def low_rank(
    x: Tensor, site: Site, uses: Sequence[Use], *, with_base: bool, extra: tuple[tuple, dict] = ((), {})
) -> Tensor:
    """(..., I) to (..., O): the base product on the whole batch in its order plus each segment's update.

    With `with_base` false, only the update (zero where no segment reaches). Ranges that no segment names are the bare
    base. The factors are cast to x's dtype; gradients reach them in their own.
    """
    factors = [use.stack.tensors[name] for use in uses for name in ("a", "b")]
    result: Tensor = _LowRank.apply(x, _Call(site, uses, with_base, extra), *factors)
    return result
