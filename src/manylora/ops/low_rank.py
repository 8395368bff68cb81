"""The low-rank update of one site for all slots of a batch: y = W x + s B A x, with s, A and B by row.

`reference` is the plain form that autograd differentiates. `low_rank` is the form in use: one `autograd.Function` a
site, or for all sites that read one input, that saves the input and the rank-wide intermediate, never a dense delta,
and never asks for a gradient of W.

Where factors are anchored to their start, the update is s (B A - B0 A0), computed as s ((B - B0) A + B0 (A - A0)): the
differences are taken in float32, so both terms are exactly zero at the start, and what is learned is no small
difference of two large products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn import functional

from manylora.gathering import gathered
from manylora.ops.dropout import dropout_mask
from manylora.ops.groups import Block, Grouping, grouping, index_of
from manylora.ops.rounding import fake_quantised
from manylora.ops.snapshot import Snapshot
from manylora.types import Runs, Segment, Site, Stack, Use

FEW_ITEMS = 16
"""Up to so many items the factors are used in float32 where no gradient is wanted: a product of so few in bfloat16 is
all overhead. Measured, one thread: (1, 576) with (16, 576) 28 us in bfloat16, 5 us in float32."""


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


Together = Sequence[tuple[Site, Sequence[Use]]]
"""Sites that read one input, and the uses of each."""


@dataclass(frozen=True, slots=True)
class _Call:
    """What one application of the Function needs beside tensors."""

    sites: Together
    with_base: bool
    extra: tuple[tuple, dict]


@dataclass(frozen=True, slots=True)
class _Part:
    """One use of a joint: its site's number, its tensors and the number of the first of them, and its columns."""

    output: int
    stack: Stack
    held: Sequence[Tensor]
    first: int
    columns: slice

    @property
    def rank(self) -> int:
        """Columns of its a; its part of what is rank-wide is twice that with anchors."""
        return self.held[0].shape[1]


@dataclass(frozen=True, slots=True)
class _Joint:
    """Uses of the same runs, whose products with the input are one; where dropout is on, a use is a joint by itself."""

    blocks: Grouping
    parts: Sequence[_Part]


class _LowRank(torch.autograd.Function):
    """The outputs of sites that read one input x.

    Saves x (n, I), for each block of each joint t = s x A^T (G, length, R of all its parts; 2R with anchors), and what
    the factors were cast to, where that is smaller than they are. Gradients for x, every a and b.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, call: _Call, *factors: Tensor) -> tuple[Tensor, ...]:
        joints = [(joint, _cast(joint, x.dtype)) for joint in _joints(call.sites, factors)]
        made, flat, middles = _outputs(x, call, joints)
        casts = [tensor for _, cast in joints for tensor in cast]
        ctx.call, ctx.shape = call, x.shape
        kept = casts if factors[0].element_size() > x.element_size() else []
        ctx.num_factors, ctx.num_casts = len(factors), len(kept)
        ctx.save_for_backward(*factors, *kept, flat, *middles)
        return made

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        saved = iter(ctx.saved_tensors)
        factors, casts = tuple(islice(saved, ctx.num_factors)), list(islice(saved, ctx.num_casts))
        flat, middles = next(saved), saved
        above = [grad.reshape(flat.shape[0], -1) for grad in grad_outputs]
        grad_x = _through_base(call, above) if ctx.needs_input_grad[0] else None
        grads: list[Tensor | None] = [None] * len(factors)
        for joint in _joints(call.sites, factors):
            of_a: list[Tensor] = []
            of_bs: list[list[Tensor]] = [[] for _ in joint.parts]
            cast = casts[: len(joint.parts) + 1] or _cast(joint, above[0].dtype)
            casts = casts[len(cast) :]
            for block, a, bs in _by_block(joint, cast):
                part, mask = _dropped(block, joint.parts[0].stack, flat)
                middle, backs = next(middles), []
                for own, b, of_b in zip(joint.parts, bs, of_bs, strict=True):
                    gy = block.take_gradient(above[own.output])
                    backs.append(torch.bmm(gy, b))
                    of_b.append(torch.bmm(gy.transpose(1, 2), middle[..., own.columns][..., : own.rank]))
                back = _scaled(_beside(backs), block, joint.parts)
                halved = _beside([_of_a(back[..., own.columns], own.rank) for own in joint.parts], back)
                of_a.append(torch.bmm(halved.transpose(1, 2), part))
                if grad_x is not None:
                    block.add_product(grad_x, back, a, mask)
            reached = 0
            for own, of_b in zip(joint.parts, of_bs, strict=True):
                rows = [product.narrow(1, reached, own.rank) for product in of_a]
                grads[own.first] = _stacked(own.held[0], joint.blocks.blocks, rows)
                grads[own.first + 1] = _stacked(own.held[1], joint.blocks.blocks, of_b)
                reached += own.rank
        return (None if grad_x is None else grad_x.view(ctx.shape), None, *grads)


def _outputs(
    x: Tensor, call: _Call, joints: Sequence[tuple[_Joint, list[Tensor]]]
) -> tuple[tuple[Tensor, ...], Tensor, list[Tensor]]:
    """The outputs of a call, its input as items (n, I), and what is rank-wide for each block of each joint.

    Products with factors are taken in the dtype that these were cast to.
    """
    flat = x.reshape(-1, x.shape[-1])
    if call.with_base:
        made = tuple(site.map(x, *call.extra[0], **call.extra[1]) for site, _ in call.sites)
    else:
        made = tuple(x.new_zeros(*x.shape[:-1], site.out_in[0]) for site, _ in call.sites)
    outputs = [y.view(flat.shape[0], -1) for y in made]
    middles: list[Tensor] = []
    for joint, cast in joints:
        given = flat.to(cast[0].dtype)
        for block, a, bs in _by_block(joint, cast):
            part, _ = _dropped(block, joint.parts[0].stack, given)
            middle = _scaled(torch.bmm(part, a.transpose(1, 2)), block, joint.parts)
            for own, b in zip(joint.parts, bs, strict=True):
                block.add_product(outputs[own.output], middle[..., own.columns], b.transpose(1, 2))
            middles.append(middle)
    return made, flat, middles


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Joints with their factors as they are used, of these uses and of tensors as they were then."""

    uses: Sequence[Use]
    dtype: torch.dtype
    factors: Snapshot
    joints: Sequence[tuple[_Joint, list[Tensor]]]


_prepared_of: WeakKeyDictionary[Stack, _Prepared] = WeakKeyDictionary()
"""What was prepared last, by the first stack of a call: decoding asks for the same at every token."""


def _prepared(call: _Call, dtype: torch.dtype) -> Sequence[tuple[_Joint, list[Tensor]]]:
    """The joints of a call that wants no gradient, and their factors as they are used, cast once for every change."""
    uses = [use for _, own in call.sites for use in own]
    factors = [tensor for use in uses for tensor in _held(use)]
    found = _prepared_of.get(uses[0].stack)
    if (
        found is None
        or found.dtype != dtype
        or [id(use) for use in found.uses] != [id(use) for use in uses]
        or not found.factors.holds(factors)
    ):
        joints = [(joint, _cast(joint, dtype)) for joint in _joints(call.sites, factors)]
        found = _prepared_of[uses[0].stack] = _Prepared(uses, dtype, Snapshot(factors), joints)
    return found.joints


def _through_base(call: _Call, above: Sequence[Tensor]) -> Tensor:
    """The gradient of x (n, I) by way of the frozen weights, zero where the base is not computed here."""
    if not call.with_base:
        return above[0].new_zeros(len(above[0]), call.sites[0][0].out_in[1])
    (first, _), *others = call.sites
    with gathered(first.module):
        grad_x = above[0] @ first.weight(above[0].dtype)
    for (site, _), grad in zip(others, above[1:], strict=True):
        with gathered(site.module):
            grad_x.addmm_(grad, site.weight(grad.dtype))
    return grad_x


def _held(use: Use) -> tuple[Tensor, ...]:
    """a and b of a stack, and their anchors where it has any."""
    stack = use.stack
    anchors = (stack.anchors["a"], stack.anchors["b"]) if stack.anchors else ()
    return stack.tensors["a"], stack.tensors["b"], *anchors


def _joints(sites: Together, factors: Sequence[Tensor]) -> list[_Joint]:
    """All uses, each with its share of what `_held` gave for them; those of the same runs and no dropout together."""
    found: dict[Any, tuple[Runs, list[_Part]]] = {}
    reached = 0
    for output, (_, uses) in enumerate(sites):
        for use in uses:
            count = 4 if use.stack.anchors else 2
            held = factors[reached : reached + count]
            key = reached if any(use.stack.dropouts) else use.runs
            _, parts = found.setdefault(key, (use.runs, []))
            before = parts[-1].columns.stop if parts else 0
            columns = slice(before, before + held[0].shape[1] * (count // 2))
            parts.append(_Part(output, use.stack, held, reached, columns))
            reached += count
    return [_Joint(grouping(runs), parts) for runs, parts in found.values()]


def _beside(tensors: Sequence[Tensor], whole: Tensor | None = None) -> Tensor:
    """Rank-wide intermediates (G, length, R) side by side; `whole` if that is what it would give, of the same width."""
    if whole is not None and whole.shape[-1] == sum(tensor.shape[-1] for tensor in tensors):
        return whole
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim=-1)


def _of_a(back: Tensor, rank: int) -> Tensor:
    """The gradient's rank-wide intermediate for a, which stands in both halves of an anchored update."""
    return back if back.shape[-1] == rank else back[..., :rank] + back[..., rank:]


def _cast(joint: _Joint, dtype: torch.dtype) -> list[Tensor]:
    """a (P, R of all parts, I) and each part's b (P, O, R) in the compute dtype, for the P places in use.

    With anchors both are 2R wide. On a grid, the masters are rounded to it; nothing of them lies beyond its ends, so
    the gradients of what is used here are those of the masters, straight through.
    """
    used = joint.blocks.used
    pairs = []
    for part in joint.parts:
        picked = [used.of_stack(tensor) for tensor in part.held]
        pairs.append(
            widened(*picked) if len(picked) == 4 else fake_quantised(picked[0], picked[1], part.stack.rounding)
        )
    if len(pairs) == 1:
        a = pairs[0][0].to(dtype)
    else:
        a = pairs[0][0].new_empty(used.count, joint.parts[-1].columns.stop, pairs[0][0].shape[-1], dtype=dtype)
        for part, (own, _) in zip(joint.parts, pairs, strict=True):
            a[:, part.columns].copy_(own)
    return [a, *(b.to(dtype) for _, b in pairs)]


def _by_block(joint: _Joint, cast: Sequence[Tensor]) -> Iterator[tuple[Block, Tensor, list[Tensor]]]:
    """Each block with the a (G, R of all parts, I) and each part's b (G, O, R) of its groups."""
    a, *bs = cast
    for block, own in zip(joint.blocks.blocks, joint.blocks.own, strict=True):
        yield block, own.of_stack(a), [own.of_stack(b) for b in bs]


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


def _scaled(middle: Tensor, block: Block, parts: Sequence[_Part]) -> Tensor:
    """A rank-wide intermediate (G, length, R of all parts) times the scale of each part and group, in place."""
    scales = [tuple(part.stack.scales[place] for place in block.places) for part in parts]
    if len({scale for own in scales for scale in own}) == 1:
        return middle.mul_(scales[0][0])
    dtype = torch.promote_types(middle.dtype, torch.float32)
    for part, own in zip(parts, scales, strict=True):
        middle[..., part.columns].mul_(_column(own, dtype, middle.device))
    return middle


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
    return _applied(x, _Call([(site, uses)], with_base, extra))[0]


def low_rank_together(x: Tensor, sites: Together) -> tuple[Tensor, ...]:
    """What `low_rank` gives with the base for each of several sites that read one input.

    Their products with the input are one, and so is what they add to its gradient: the sums of neighbouring sites are
    added in another order than autograd would.
    """
    return _applied(x, _Call(sites, True, ((), {})))


def _applied(x: Tensor, call: _Call) -> tuple[Tensor, ...]:
    if not torch.is_grad_enabled():
        few = x.numel() <= FEW_ITEMS * x.shape[-1]
        dtype = torch.promote_types(x.dtype, torch.float32) if few else x.dtype
        return _outputs(x, call, _prepared(call, dtype))[0]
    factors = [tensor for _, uses in call.sites for use in uses for tensor in _held(use)]
    result: tuple[Tensor, ...] = _LowRank.apply(x, call, *factors)
    return result
