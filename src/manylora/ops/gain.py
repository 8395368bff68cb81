"""Outputs of a map times a gain of each place, and the norms of changed weights that such a gain divides by.

Semantics: for an item i of place p, `out[i] = bias + (y[i] - bias) * magnitude[p] / norms[p]`, the norms constants.

The gain is applied as y + (y - bias) (gain - 1): in bfloat16 the gain itself would have no more than eight bits, and
what training makes of it in the beginning would be lost; its difference from 1 keeps all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from manylora.ops.groups import Choice, grouping, index_of
from manylora.types import Runs


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
    """The places of one stack that change a batch: `magnitude` (P, O), which is trained, `norms` (P, O), the runs."""

    magnitude: Tensor
    norms: Tensor
    runs: Runs


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

    `bias` gives the bias (O,), in forward and again in backward: a frozen one may be away between the two.
    """
    result: Tensor = _Gained.apply(y, gains, bias, *(gain.magnitude for gain in gains))
    return result


class _Gained(torch.autograd.Function):
    """Saves y and the gains less 1, (P, O) of each stack."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gains: Sequence[Gain], read: Callable[[], Tensor] | None, *magnitudes: Tensor
    ) -> Tensor:
        bias = None if read is None else read()
        flat = y.reshape(-1, y.shape[-1])
        covered = len(gains) == 1 and gains[0].runs.covers_all
        out = torch.empty_like(flat) if covered else flat.clone()
        lessened = [gain_of(gain.magnitude, gain.norms).sub_(1.0).to(y.dtype) for gain in gains]
        for gain, less in zip(gains, lessened, strict=True):
            for places, (given, made) in _pieces(gain.runs, (flat, out)):
                own = places.of_stack(less)[:, None, :]
                torch.addcmul(given, given, own, out=made)
                if bias is not None:
                    made.sub_(own * bias)
        ctx.gains, ctx.read, ctx.shape = gains, read, y.shape
        ctx.save_for_backward(flat, *lessened)
        return out.view(y.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        flat, *lessened = ctx.saved_tensors
        above = grad_outputs[0].reshape(flat.shape)
        gains, bias = ctx.gains, None if ctx.read is None else ctx.read()
        covered = len(gains) == 1 and gains[0].runs.covers_all
        grad_y = torch.empty_like(above) if covered else above.clone()
        grads: list[Tensor] = []
        for gain, less in zip(gains, lessened, strict=True):
            total = torch.zeros_like(gain.magnitude)
            for places, (y, grad, below) in _pieces(gain.runs, (flat, above, grad_y)):
                torch.addcmul(grad, grad, places.of_stack(less)[:, None, :], out=below)
                summed = (grad * y).sum(1).to(total.dtype)
                if bias is not None:
                    summed.sub_(grad.sum(1).to(total.dtype) * bias)
                total.index_add_(0, index_of(_named(places), total.device), summed)
            norms = gain.norms.to(total.dtype)
            grads.append(torch.where(norms > 0, total / norms, 0.0))
        return grad_y.view(ctx.shape), None, None, *grads


def _pieces(runs: Runs, flats: Sequence[Tensor]) -> Iterator[tuple[Choice, tuple[Tensor, ...]]]:
    """The items (n, O) of several tensors that places change, as views (G, length, O), one place a group."""
    for block in grouping(runs).blocks:
        if block.apart is not None:
            yield Choice.of(block.places), tuple(block.take(flat) for flat in flats)
            continue
        for segment in block.segments:
            yield Choice.of([segment.place]), tuple(flat[segment.start : segment.stop][None] for flat in flats)


def _named(places: Choice) -> tuple[int, ...]:
    return places.index or tuple(range(places.first, places.first + places.count))
