"""Losses by position whose gradient is known as soon as they are computed, so that nothing is computed again.

Behind a frozen head, what a position is worth depends on its own hidden state alone. So its gradient with respect to
that state can be had together with its value, up to the one number by which backward multiplies it. What is kept
between the two is of the size of the hidden states; two products with the head's weight are enough, and nothing of the
size positions x vocabulary ever exists.

`reference` is the plain form that autograd differentiates; `linear_nats` is the form in use for cross-entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from manylora.ops.repeated import repeated

TILE_POSITIONS = 512
"""Positions that share a tile: as fast as any number above, and twice the arithmetic for each weight that is read."""
TILE_ELEMENTS = 3 << 18
"""Logits of a tile, positions x tokens of the vocabulary: it should stay in a processor's cache."""
TILE_STEP = 64
"""A tile's tokens come in multiples of it, so that its rows are aligned."""
LINEAR_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""Dtypes of a weight that `linear_nats` takes. The sums of a tile are not divided yet: float16 might not hold them."""


def nats(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The negative log-likelihood (n,) of each label (n,) under its logits (n, V)."""
    return {"nats": functional.cross_entropy(logits, labels, reduction="none")}


def reference(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear_nats` in plain autograd: all logits at once. Slow, and the truth that the tiles are tested against."""
    logits = functional.linear(hidden.to(weight.dtype), weight, bias)
    return functional.cross_entropy(logits.to(_wide(weight)), labels, reduction="none")


def linear_nats(hidden: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Nats (n,) of labels (n,) behind a frozen head (V, H) on states (n, H), in float32 (float64 stays).

    The products are those of the weight's dtype; all else is float32 or better. Where the states need a gradient it is
    computed here, a tile of tokens after the other, and (n, H) numbers are kept for backward. Once differentiable.

    Semantics: with p[v] = exp(logit[v] - top), `nats = top + log(sum(p)) - logit[y]`, and the gradient is
    `sum_v(p[v] (weight[v] - weight[y])) / sum(p)`. Its own token is left out of both sums, where it would cancel: a
    position that is nearly certain has a gradient as precise as any other's.
    Source: the sums over tiles under a maximum that moves: 1805.02867, algorithm 3; with values: 2205.14135, alg. 1.
    """
    wanted = torch.is_grad_enabled() and hidden.requires_grad
    count = len(hidden)
    with torch.no_grad():
        values = torch.empty(count, dtype=_wide(weight), device=hidden.device)
        gradient = torch.empty_like(hidden) if wanted else None
        for part in _parts(count, TILE_POSITIONS):
            states = hidden[part].to(weight.dtype)
            values[part] = _sweep(states, labels[part], weight, bias, None if gradient is None else gradient[part])
    return values if gradient is None else with_gradient(values, hidden, gradient)


@repeated
def _sweep(states: Tensor, labels: Tensor, weight: Tensor, bias: Tensor | None, gradient: Tensor | None) -> Tensor:
    """Nats of a few positions, all tokens in tiles; their gradient is written to `gradient`."""
    count, wide = len(states), _wide(weight)
    width = max(TILE_STEP, TILE_ELEMENTS // count // TILE_STEP * TILE_STEP)
    labels = labels[:, None]
    # The lowest finite number and not -inf: a tile may hold nothing but tokens that a bias of -inf rules out.
    top = torch.full((count, 1), torch.finfo(wide).min, dtype=wide, device=states.device)
    total, own = torch.zeros_like(top), torch.zeros_like(top)
    pull = torch.zeros(states.shape if gradient is not None else (0,), dtype=wide, device=states.device)
    # One buffer for all tiles, since memory that is given back and taken again is faulted in again.
    space = states.new_empty(count * min(width, len(weight)))
    wide_space = space if space.dtype == wide else torch.empty_like(space, dtype=wide)
    for start in range(0, len(weight), width):
        rows = weight[start : start + width]
        logits, shares = (given[: count * len(rows)].view(count, -1) for given in (space, wide_space))
        if bias is None:
            torch.mm(states, rows.t(), out=logits)
        else:
            torch.addmm(bias[start : start + width], states, rows.t(), out=logits)
        before, top = top, torch.maximum(top, logits.amax(dim=1, keepdim=True))
        shares.copy_(logits)
        # No selection by a mask: its size would have to be known, and an accelerator would wait for it.
        column = (labels - start).clamp(0, len(rows) - 1)
        here = column + start == labels
        at_column = shares.gather(1, column)
        own = torch.where(here, at_column, own)
        shares.scatter_(1, column, at_column.masked_fill(here, -math.inf))
        shares.sub_(top).exp_()
        faded = before.sub_(top).exp_()
        total.mul_(faded).add_(shares.sum(dim=1, keepdim=True))
        if gradient is not None:
            pull.mul_(faded).add_(logits.copy_(shares) @ rows)
    of_own = (own - top).exp_()
    everything = total + of_own
    if gradient is not None:
        gradient.copy_(pull.addcmul_(total, weight[labels[:, 0]].to(wide), value=-1).div_(everything))
    return (top - own).add_(everything.log_())[:, 0]


def values_and_gradient(
    fn: Callable[[Tensor], Mapping[str, Tensor]], hidden: Tensor
) -> tuple[dict[str, Tensor], str | None, Tensor | None] | None:
    """`fn(hidden (n, H)) -> {name: (n,)}` detached, the name of the one output with a gradient, that gradient (n, H).

    `with_gradient` joins them again. None for name and gradient where no output has one. None altogether where several
    have one, since each would take a backward of its own, and where anything but the states has one too.
    """
    # Hooks count or move what waits for a backward; this graph does not outlive the call, so theirs are not for it.
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        states = hidden.detach().requires_grad_()
        values = fn(states)
        trained = [name for name, value in values.items() if value.requires_grad]
        if len(trained) > 1 or any(leaf is not states for name in trained for leaf in _leaves(values[name])):
            return None
        gradient = torch.autograd.grad(values[trained[0]].sum(), states)[0] if trained else None
    return {name: value.detach() for name, value in values.items()}, trained[0] if trained else None, gradient


def _leaves(value: Tensor) -> list[Tensor]:
    """The tensors that a backward from a value would give a gradient."""
    if value.grad_fn is None:
        return [value]
    found: list[Tensor] = []
    seen, waiting = {value.grad_fn}, [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        fresh = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= fresh
        waiting += fresh
    return found


def with_gradient(values: Tensor, hidden: Tensor, gradient: Tensor) -> Tensor:
    """The values (n,), whose gradient with respect to the states (n, H) is `gradient` (n, H), position by position."""
    result: Tensor = _Known.apply(hidden, values, gradient)
    return result


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, values: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator hides the name of ctx
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        result = torch.empty_like(gradient)
        # Part by part, since the product is made in the wider dtype of the two; and not in place: there may be a
        # further backward.
        for part in _parts(len(gradient), TILE_POSITIONS):
            result[part] = gradient[part] * grad_outputs[0][part, None]
        return result, None, None


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _parts(count: int, most: int) -> list[slice]:
    """Slices of nearly one size that cover `count`, none larger than `most`."""
    size = math.ceil(count / max(1, math.ceil(count / most)))
    return [slice(start, start + size) for start in range(0, count, size or 1)]
