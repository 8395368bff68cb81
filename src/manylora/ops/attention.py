"""Attention inside the sequences of packed rows, on a CPU: no score across sequences, none above the diagonal's tiles.

`reference` is the plain form that autograd differentiates. `attention` is the form in use: one `autograd.Function`
that saves q, k, v, the output and the logarithm of each softmax's denominator, and computes the scores again in
backward.

The backward's products are widened by two columns. With q' = [q, -l] and k' = [k, 1] the product q' k'^T is the score
less l, the logarithm of its softmax's denominator, and its exponential is the probability; with g' = [g, -d] and v' =
[v, 1] the product g' v'^T is what the probability is multiplied by in the score's gradient. So each takes one product
and one pass over the scores, and, what decides in bfloat16, the differences are taken in the product's float32 sums:
rounding comes after them and is relative to the small result. l and d stand in two columns, one for what the first
rounds away.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from manylora.ops.attention_layout import Group, Layout
from manylora.ops.repeated import repeated

SCORES_AT_ONCE = 1 << 19
"""Scores that are computed at one time, about: they should stay in a core's cache. Measured: bench/attention.py."""


def reference(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float | None = None) -> Tensor:
    """Attention in plain autograd: q (B, H, T, D), k (B, K, T, D), v (B, K, T, E) to (B, H, T, E). Slow, and the truth.

    Query head h reads head h // (H / K) of k and v. Without `scale`, 1 / sqrt(D). Padding is zero.

    Semantics: `out[b, h, t] = sum_s softmax_s(scale * q[b, h, t] . k[b, g, s]) v[b, g, s]`, s in t's span (and s <= t).
    """
    rows, heads, tokens, width = q.shape
    share = heads // k.shape[1]
    scale = 1 / math.sqrt(width) if scale is None else scale
    out = q.new_zeros(rows, heads, tokens, v.shape[-1])
    for start, stop in layout.spans:
        row, first, last = start // tokens, start % tokens, (stop - 1) % tokens + 1
        keys, values = (part[row, :, first:last].repeat_interleave(share, dim=0) for part in (k, v))
        scores = scale * (q[row, :, first:last] @ keys.transpose(1, 2))
        if layout.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        out[row, :, first:last] = scores.softmax(dim=-1) @ values
    return out


def attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float | None = None) -> Tensor:
    """What `reference` gives, fast: bfloat16 products with a float32 softmax, or all in float32 or float64.

    The memory of the result is that of (B, T, H, E). Gradients can be taken once.

    Raises:
        ValueError: shapes that do not fit each other or the layout.
    """
    if has_torch_function((q, k, v)):  # whoever watches products sees this one
        return handle_torch_function(attention, (q, k, v), q, k, v, layout, scale)
    rows, heads, tokens, width = q.shape
    if (rows, tokens) != (layout.rows, layout.tokens) or k.shape[:3] != v.shape[:3] or heads % k.shape[1]:
        raise ValueError(
            f"attention of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} "
            f"over {layout.rows} rows of {layout.tokens} tokens"
        )
    if k.shape != (rows, k.shape[1], tokens, width):
        raise ValueError(f"k is {tuple(k.shape)}, not (B, K, T, D) of q {tuple(q.shape)}")
    result: Tensor = _Attention.apply(q, k, v, layout, 1 / math.sqrt(width) if scale is None else scale)
    return result


class _Attention(torch.autograd.Function):
    """q (B, H, T, D), k (B, K, T, D), v (B, K, T, E) to (B, H, T, E); saves these and (B * T, H) of float32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        rows, heads, tokens, _ = q.shape
        make = torch.empty if layout.covers else torch.zeros
        wide = torch.promote_types(q.dtype, torch.float32)
        out = make(rows * tokens, heads, v.shape[-1], dtype=q.dtype)
        logs = make(rows * tokens, heads, dtype=wide)
        flat = [_flat(part) for part in (q, k, v)]
        for group in layout.groups:
            _forward(group, layout.causal, scale, flat, out, logs)
        ctx.save_for_backward(q, k, v, out, logs)
        ctx.layout, ctx.scale = layout, scale
        return out.view(rows, tokens, heads, -1).transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, logs = ctx.saved_tensors
        layout: Layout = ctx.layout
        grad = _flat(grad_outputs[0])
        # Widened first: a product of two dtypes takes thrice the time, and one in bfloat16 adds half of the gradients'
        # other rounding.
        dots = (grad.to(logs.dtype) * out.to(logs.dtype)).sum(dim=-1)
        make = torch.empty if layout.covers else torch.zeros
        flat = [_flat(part) for part in (q, k, v)]
        grads = [make(part.shape, dtype=part.dtype) for part in flat]
        for group in layout.groups:
            _backward(group, layout.causal, ctx.scale, flat, (grad, logs, dots), grads)
        rows, _, tokens, _ = q.shape
        return (*(part.view(rows, tokens, *part.shape[1:]).transpose(1, 2) for part in grads), None, None)


@repeated
def _forward(group: Group, causal: bool, scale: float, flat: list[Tensor], out: Tensor, logs: Tensor) -> None:
    """Write the outputs (tokens, H, E) of a group's spans, and the logarithms (tokens, H) of their denominators."""
    q, k, v = flat
    share = q.shape[1] // k.shape[1]
    queries = _tiles(group, q, share, logs.dtype)
    keys, values = _units(group, k, logs.dtype).mul_(scale), _units(group, v, v.dtype)
    num_units, length, _ = keys.shape
    hidden = _hidden(group, causal, k.shape[1], logs.dtype)
    found = out.new_empty(*queries.shape[:3], v.shape[-1])
    sums = logs.new_empty(queries.shape[:3])
    at_once = _units_at_once(group, share, num_units)
    score_space, part_space = (part.new_empty(at_once * share * group.tile * length) for part in (logs, q))
    for units, tile, seen in _blocks(group, num_units, at_once, causal):
        shape = units.stop - units.start, share * group.tile, seen
        scores = score_space[: math.prod(shape)].view(shape)
        torch.bmm(queries[tile, units], keys[units, :seen].transpose(1, 2), out=scores)
        if hidden is not None and causal:
            scores.view(-1, group.tile, seen)[..., tile * group.tile :].add_(hidden)
        elif hidden is not None:
            scores.add_(hidden[units])
        largest = scores.amax(dim=-1)
        torch.softmax(scores, dim=-1, out=scores)
        torch.sub(largest, scores.amax(dim=-1).log_(), out=sums[tile, units])
        parts = scores if v.dtype == scores.dtype else part_space[: math.prod(shape)].view(shape).copy_(scores)
        torch.bmm(parts, values[units, :seen], out=found[tile, units])
    _put_tiles(group, found, share, out)
    _put_tiles(group, sums.unsqueeze(-1), share, logs.unsqueeze(-1))


@repeated
def _backward(
    group: Group,
    causal: bool,
    scale: float,
    flat: list[Tensor],
    known: tuple[Tensor, Tensor, Tensor],
    grads: list[Tensor],
) -> None:
    """Write the gradients of q, k and v at a group's spans; `known`: the output's gradient, `logs`, and their dots."""
    q, k, v = flat
    grad, logs, dots = known
    width, depth, share, tile_size = q.shape[-1], v.shape[-1], q.shape[1] // k.shape[1], group.tile
    # What stands at padding is finite; with these zeros it reaches no gradient of what is real.
    queries, upstream = _tiles(group, q, share, q.dtype, 2), _tiles(group, grad, share, q.dtype, 2, clear=True)
    _widen(queries, _tiles(group, logs.unsqueeze(-1), share, logs.dtype).div_(scale))
    _widen(upstream, _tiles(group, dots.unsqueeze(-1), share, logs.dtype, clear=True))
    keys, values = (_units(group, part, part.dtype, 2, clear=not causal) for part in (k, v))
    num_units, length, _ = keys.shape
    of_q = q.new_empty(*queries.shape[:3], width)
    summed = q.dtype if group.num_tiles == 1 else logs.dtype
    of_k, of_v = (part.new_empty(num_units, length, part.shape[-1], dtype=summed) for part in (k, v))
    at_once = _units_at_once(group, share, num_units)
    spaces = q.new_empty(2, at_once * share * tile_size * length)
    for units, tile, seen in _blocks(group, num_units, at_once, causal):
        shape = units.stop - units.start, share * tile_size, seen
        parts, pulls = (space[: math.prod(shape)].view(shape) for space in spaces)
        _product(queries[tile, units], keys[units, :seen].transpose(1, 2), scale, parts).exp_()
        if causal:
            parts.view(-1, tile_size, seen).tril_(tile * tile_size)
        torch.bmm(upstream[tile, units], values[units, :seen].transpose(1, 2), out=pulls).mul_(parts)
        _product(pulls, keys[units, :seen, :width], scale, of_q[tile, units])
        last = tile == group.num_tiles - 1  # comes first, and sees every key
        _collect(of_k[units, :seen], pulls.transpose(1, 2), queries[tile, units, :, :width], last)
        _collect(of_v[units, :seen], parts.transpose(1, 2), upstream[tile, units, :, :depth], last)
    _put_tiles(group, of_q, share, grads[0])
    _put_units(group, of_k.mul_(scale), grads[1])
    _put_units(group, of_v, grads[2])


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor) -> Tensor:
    """Scaled before it is rounded: in bfloat16, what is scaled before or after it is rounded once more."""
    return torch.baddbmm(out, left, right, beta=0, alpha=scale, out=out)


def _collect(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Add a product to what is summed in float32 over the tiles, or begin with it."""
    if first and total.dtype == left.dtype and total.is_contiguous():
        torch.bmm(left, right, out=total)
    elif first:
        total.copy_(torch.bmm(left, right))
    else:
        total.add_(torch.bmm(left, right))


def _units_at_once(group: Group, share: int, num_units: int) -> int:
    """Units whose scores are computed together: a power of two, as all counts of units in `_blocks`."""
    fit = SCORES_AT_ONCE // (share * group.tile * group.length)
    return 1 << (max(1, min(fit, num_units)).bit_length() - 1)


def _blocks(group: Group, num_units: int, at_once: int, causal: bool) -> Iterator[tuple[slice, int, int]]:
    """Units, tile and number of keys seen; a unit is one span under one head of k. The last tile comes first.

    The counts of units are powers of two: the products' shapes are few, for each new one is compiled at its first use
    (0.7 ms in oneDNN), and the lengths of packed sequences are always new.
    """
    first = 0
    while first < num_units:
        while at_once > num_units - first:
            at_once //= 2
        for tile in reversed(range(group.num_tiles)):
            yield slice(first, first + at_once), tile, (tile + 1) * group.tile if causal else group.length
        first += at_once


def _hidden(group: Group, causal: bool, num_heads: int, dtype: torch.dtype) -> Tensor | None:
    """What is added to scores: (tile, tile) on the diagonal, or (units, 1, length) where padding is no key."""
    if causal:
        return torch.full((group.tile, group.tile), -math.inf, dtype=dtype).triu_(1)
    if not group.padded:
        return None
    hidden = torch.zeros(len(group.starts) * group.length, dtype=dtype).index_fill_(0, group.padding, -math.inf)
    return hidden.view(-1, 1, group.length).repeat_interleave(num_heads, dim=0)


def _flat(part: Tensor) -> Tensor:
    """(B, H, T, D) to contiguous (B * T, H, D)."""
    return part.transpose(1, 2).contiguous().view(-1, part.shape[1], part.shape[3])


def _taken(group: Group, flat: Tensor, clear: bool = False) -> Tensor:
    """(n, length, heads, D) of (tokens, heads, D), zero at padding if `clear`; a view where the spans lie evenly."""
    shape = len(group.starts), group.length, *flat.shape[1:]
    if group.apart is None:
        taken = flat.view(len(flat), -1).index_select(0, group.places)
        return (taken.index_fill_(0, group.padding, 0) if clear else taken).view(shape)
    step = flat.stride(0)
    strides = group.apart * step, *flat.stride()
    return flat.as_strided(shape, strides, flat.storage_offset() + group.starts[0] * step)


def _tiles(
    group: Group, flat: Tensor, share: int, dtype: torch.dtype, extra: int = 0, *, clear: bool = False
) -> Tensor:
    """(num_tiles, units, share * tile, D + extra) of (tokens, H, D): the heads of one head of k stand together."""
    count, heads, width = len(group.starts), flat.shape[1] // share, flat.shape[-1]
    taken = _taken(group, flat, clear).view(count, group.num_tiles, group.tile, heads, share, width)
    made = torch.empty(group.num_tiles, count, heads, share, group.tile, width + extra, dtype=dtype)
    made[..., :width].copy_(taken.permute(1, 0, 3, 4, 2, 5))
    return made.view(group.num_tiles, count * heads, share * group.tile, width + extra)


def _units(group: Group, flat: Tensor, dtype: torch.dtype, extra: int = 0, *, clear: bool = False) -> Tensor:
    """(units, length, D + extra) of (tokens, K, D); what is extra is 1. All of it is zero at padding if `clear`."""
    count, (heads, width) = len(group.starts), flat.shape[1:]
    made = torch.empty(count, heads, group.length, width + extra, dtype=dtype)
    made[..., :width].copy_(_taken(group, flat, clear).transpose(1, 2))
    made[..., width:] = group.real.view(count, 1, group.length, 1) if clear else 1
    return made.view(-1, group.length, width + extra)


def _widen(tiles: Tensor, less: Tensor) -> None:
    """Write -less (..., 1) into the two last columns, as the nearest number and the rest."""
    torch.neg(less, out=less)
    tiles[..., -2:-1] = less
    tiles[..., -1:] = less - tiles[..., -2:-1]


def _put_tiles(group: Group, tiles: Tensor, share: int, flat: Tensor) -> None:
    """Write (num_tiles, units, share * tile, D) to its places in (tokens, H, D)."""
    parts = tiles.view(group.num_tiles, len(group.starts), -1, share, group.tile, tiles.shape[-1])
    _put(group, parts.permute(1, 0, 4, 2, 3, 5), flat)


def _put_units(group: Group, units: Tensor, flat: Tensor) -> None:
    """Write (units, length, D) to its places in (tokens, K, D)."""
    _put(group, units.view(len(group.starts), -1, *units.shape[1:]).transpose(1, 2), flat)


def _put(group: Group, parts: Tensor, flat: Tensor) -> None:
    if group.apart is not None:
        taken = _taken(group, flat)
        taken.view(parts.shape).copy_(parts)
        return
    chosen, tokens = group.tokens
    rows = parts.reshape(len(group.starts) * group.length, -1)
    rows = rows.index_select(0, chosen) if group.padded else rows
    flat.view(len(flat), -1).index_copy_(0, tokens, rows.to(flat.dtype))
