"""Outputs of a map times a gain of each place, and the norms of changed weights that such a gain divides by.

Semantics: for an item i of place p, `out[i] = bias + (y[i] - bias) * magnitude[p] / norms[p]`, the norms constants.

The gain stays in float32 whatever y is: in bfloat16 it would have no more than eight bits, and what training makes of
it in the beginning would be lost.

It is applied in place, and the backward finds y - bias again as (out - bias) / gain: what comes after a map mostly
keeps its output anyway, so a second one beside it would be the largest thing that a gain costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manylora.types import Runs, Segment

LEAST_GAIN = 1e-3
"""A smaller gain leaves too little of y beside a bias."""


def row_norms(weight: Tensor, squares: Tensor, a: Tensor, b: Tensor, scales: Tensor) -> Tensor:
    """(P, O) norms of the rows of W + s B A, in float32 or better, without that matrix.

    W (O, I) of any dtype, `squares` what `row_squares` gives of it, a (P, R, I), b (P, O, R), scales (P,). The product
    of W and A is taken in W's own dtype: it weighs as much as the change weighs in the norm, and no more.

    Source: |w + s b A|^2 = |w|^2 + 2 s (w A^T) b + s^2 b (A A^T) b for each row w of W and b of B.
    """
    wide = squares.dtype
    places, rank, _ = a.shape
    crossed = (a.flatten(0, 1).to(weight.dtype) @ weight.t()).view(places, rank, -1).transpose(1, 2)
    a, b, scales = a.to(wide), b.to(wide), scales.to(wide)[:, None]
    first = (crossed.to(wide) * b).sum(-1)
    second = ((b @ (a @ a.transpose(1, 2))) * b).sum(-1)
    return (squares + 2 * scales * first + scales.square() * second).clamp_(min=0).sqrt_()


def row_squares(weight: Tensor) -> Tensor:
    """(O,) the sums of squares of the rows of a weight, in float32 or better."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).square().sum(1)


def gain_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    """magnitude / norms, both (P, O); 0 where a row has no norm: nothing is there to be scaled."""
    norms = norms.to(magnitude.dtype)
    return torch.where(norms > 0, magnitude / norms, 0.0)


@dataclass(frozen=True, slots=True)
class Gain:
    """The places of one stack that change a batch: `magnitude` (P, O), which is trained, `norms` (P, O), the runs.

    `recovers`: no gain is zero or nearly so, so that y can be found again from what is made of it.
    """

    magnitude: Tensor
    norms: Tensor
    runs: Runs
    recovers: bool = False


def recovers(magnitude: Tensor, norms: Tensor) -> bool:
    """Whether no place's gain is so small that what it multiplies cannot be found again from the product."""
    norms = norms.to(magnitude.dtype)
    return bool(((magnitude.abs() > LEAST_GAIN * norms) | (norms == 0)).all())


def reference(y: Tensor, gains: Sequence[Gain], bias: Tensor | None) -> Tensor:
    """`gained` in plain autograd."""
    flat = y.reshape(-1, y.shape[-1])
    for gain in gains:
        factors = gain_of(gain.magnitude, gain.norms).to(y.dtype)
        pieces, reached = [], 0
        for segment in gain.runs.segments:
            part = flat[segment.start : segment.stop]
            factor = factors[segment.place]
            part = part * factor if bias is None else (part - bias) * factor + bias
            pieces += [flat[reached : segment.start], part]
            reached = segment.stop
        flat = torch.cat([*pieces, flat[reached:]])
    return flat.view(y.shape)


def gained(y: Tensor, gains: Sequence[Gain], bias: Callable[[], Tensor] | None) -> Tensor:
    """y (..., O) with each item's own gain; items that no run names are left as they are. Gradients: y, magnitudes.

    y is written over where all gains recover it: nobody else may have kept it. `bias` gives the bias (O,), in forward
    and again in backward: a frozen one may be away between the two.
    """
    result: Tensor = _Gained.apply(y.contiguous(), gains, bias, *(gain.magnitude for gain in gains))
    return result


class _Gained(torch.autograd.Function):
    """Saves its output, or y where that cannot be found again, and the gains (P, O) of each stack."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gains: Sequence[Gain], read: Callable[[], Tensor] | None, *magnitudes: Tensor
    ) -> Tensor:
        ctx.in_place = all(gain.recovers for gain in gains)
        # Not as autograd's own in-place: y may be a view that another Function made. Whoever kept y sees its version.
        out = y.detach() if ctx.in_place else y.clone()
        wide = torch.promote_types(y.dtype, torch.float32)
        factors = [gain_of(gain.magnitude, gain.norms).to(wide) for gain in gains]
        flat, bias = out.view(-1, y.shape[-1]), _bias(read, factors[0][0])
        for gain, factor in zip(gains, factors, strict=True):
            for segment in gain.runs.segments:
                _scale_(flat[segment.start : segment.stop], factor[segment.place], bias)
        ctx.gains, ctx.read = gains, read
        ctx.save_for_backward(out if ctx.in_place else y, *factors)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        kept, *factors = ctx.saved_tensors
        flat = kept.view(-1, kept.shape[-1])
        above = grad_outputs[0].reshape(flat.shape).contiguous()
        bias = _bias(ctx.read, factors[0][0])
        grads: list[Tensor] = []
        pieces: list[tuple[Segment, Tensor]] = []
        for gain, factor in zip(ctx.gains, factors, strict=True):
            total = torch.zeros_like(factor)
            for segment in gain.runs.segments:
                grad, y = above[segment.start : segment.stop], flat[segment.start : segment.stop]
                below, summed = _scale_backward(grad, y, factor[segment.place], bias)
                total[segment.place] += summed
                pieces.append((segment, below))
            # What was summed holds the gain where the output was kept, and magnitude / norm is that gain.
            under = gain.magnitude.detach() if ctx.in_place else gain.norms
            grads.append(torch.where(gain.norms > 0, total / under.to(total), 0.0).to(gain.magnitude.dtype))
        return _laid_out(above, pieces).view(kept.shape), None, None, *grads


def _bias(read: Callable[[], Tensor] | None, like: Tensor) -> Tensor:
    """(O,) the bias, zero where there is none, in the dtype of the gains."""
    return torch.zeros_like(like) if read is None else read().to(like)


# A batch norm in evaluation is this very map: its mean and its bias are the map's bias, its variance is one and its
# weight the gain. Its kernels take each pass once and add up in float32, where products and sums of torch take four.


def _scale_(y: Tensor, factor: Tensor, bias: Tensor) -> None:
    """y (n, O) to (y - bias) factor + bias, in place."""
    none = factor.new_empty(0)
    torch.ops.aten.native_batch_norm.out(
        y, factor, bias, bias, torch.ones_like(factor), False, 0.0, 0.0, out=y, save_mean=none, save_invstd=none
    )


def _scale_backward(grad: Tensor, y: Tensor, factor: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """grad (n, O) times the factor (O,), and the sums (O,) of grad (y - bias)."""
    none = factor.new_empty(0)
    below, summed, _ = torch.ops.aten.native_batch_norm_backward(
        grad, y, factor, bias, torch.ones_like(factor), none, none, False, 0.0, [True, True, True]
    )
    return below, summed


def _laid_out(above: Tensor, pieces: Sequence[tuple[Segment, Tensor]]) -> Tensor:
    """The gradient (n, O) with pieces in their places; what none names is as it was."""
    if len(pieces) == 1 and len(pieces[0][1]) == len(above):
        return pieces[0][1]
    made = above.clone()
    for segment, piece in pieces:
        made[segment.start : segment.stop] = piece
    return made
