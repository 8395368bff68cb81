"""DoRA: a low-rank change of a weight's directions, and the length of each of its rows trained apart.

The weight in use is m (W + s B A) / |W + s B A|, row by row, m a vector (O,) that starts as what the norm is then. The
norm gets no gradient, as section 4.3 of the paper has it; dropout applies to the low-rank branch alone.

Source: DoRA (2402.09353), equations 5 and 11.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from manylora.gathering import gathered, is_gathered
from manylora.methods.lora import Lora, used
from manylora.ops.gain import Gain, gained, recovers, row_norms, row_squares
from manylora.ops.low_rank import widened
from manylora.ops.snapshot import Snapshot
from manylora.spec import AdapterSpec
from manylora.types import Factors, Site, SiteKind, Stack, Start, Use


@dataclass(frozen=True, slots=True)
class _Norms:
    """The norms (P, O) of a stack's places, its weight's squares (O,), and of which tensors they are.

    `recovers` is that of `Gain`.
    """

    squares: Tensor
    norms: Tensor
    recovers: bool
    tensors: Snapshot


_norms: WeakKeyDictionary[Stack, _Norms] = WeakKeyDictionary()


class Dora(Lora):
    """Factors a (R, I), b (O, R) and magnitude (O,)."""

    name = "dora"
    low_rank = False
    raised = frozenset({"b", "magnitude"})
    peft: Mapping[str, Any] | None = {"use_dora": True}

    def adapts(self, kind: SiteKind) -> bool:
        return kind.product

    def stack_shapes(self, site: Site, shape_class: int) -> Mapping[str, tuple[int, ...]]:
        return {**super().stack_shapes(site, shape_class), "magnitude": site.out_in[:1]}

    def init(self, start: Start, spec: AdapterSpec) -> Factors:
        factors = super().init(start, spec)
        weight, scale = start.site.weight(), torch.tensor([start.scale], dtype=torch.float64)
        a, b = (factor[None].to(weight.device) for factor in used(factors, spec.quantize))
        norms = row_norms(weight, row_squares(weight), a, b, scale.to(weight.device))[0]
        return replace(factors, tensors={**factors.tensors, "magnitude": norms.cpu()})

    def stored(self, kind: SiteKind) -> Mapping[str, str]:
        return {**super().stored(kind), "magnitude": "lora_magnitude_vector"}

    def delta(self, site: Site, factors: Factors, spec: AdapterSpec) -> Mapping[str, Tensor]:
        a, b = used(factors, spec.quantize)
        with gathered(site.module):
            weight = site.weight().to(a.device, torch.promote_types(a.dtype, torch.float32))
            moved = torch.addmm(weight, b.to(weight), a.to(weight), alpha=spec.scale(site.name))
            norms = torch.linalg.vector_norm(moved, dim=1)
            gain = torch.where(norms > 0, factors.tensors["magnitude"].to(norms) / norms, 0.0)
            return {"weight": site.own_layout(gain[:, None] * moved - weight)}

    def forward(
        self, x: Tensor, y: Tensor | None, site: Site, uses: Sequence[Use], extra: tuple[tuple, dict]
    ) -> Tensor:
        return _gained(super().forward(x, y, site, uses, extra), site, uses)

    def together(self, x: Tensor, sites: Sequence[tuple[Site, Sequence[Use]]]) -> Sequence[Tensor] | None:
        made = super().together(x, sites)
        if made is None:
            return None
        return [_gained(y, site, uses) for y, (site, uses) in zip(made, sites, strict=True)]


def _gained(y: Tensor, site: Site, uses: Sequence[Use]) -> Tensor:
    """The output of W + s B A with each row's length as its slot has it; the bias is no part of it."""
    gains = []
    for use in uses:
        found = _norms_of(site, use.stack)
        gains.append(Gain(use.stack.tensors["magnitude"], found.norms, use.runs, found.recovers))
    has_bias = getattr(site.module, "bias", None) is not None
    return gained(y, gains, partial(_bias_of, site, y.dtype) if has_bias else None)


def _bias_of(site: Site, dtype: torch.dtype) -> Tensor:
    """(O,) the site's bias as it is now; a copy where it does not stay."""
    with gathered(site.module):
        return site.module.get_parameter("bias").detach().to(dtype, copy=is_gathered(site.module))


@torch.no_grad()
def _norms_of(site: Site, stack: Stack) -> _Norms:
    """Those of a stack as its tensors are now, found once for every change of them: once a step."""
    held = [*stack.tensors.values(), *stack.anchors.values()]
    found = _norms.get(stack)
    if found is not None and found.tensors.holds(held):
        return found
    a, b = stack.tensors["a"], stack.tensors["b"]
    if stack.anchors:
        a, b = widened(a, b, stack.anchors["a"], stack.anchors["b"])
    with gathered(site.module):
        weight = site.weight()
        squares = row_squares(weight) if found is None else found.squares
        scales = torch.tensor(stack.scales, dtype=torch.float64, device=weight.device)
        norms = row_norms(weight, squares, a, b, scales)
    _norms[stack] = found = _Norms(squares, norms, recovers(stack.tensors["magnitude"], norms), Snapshot(held))
    return found


DORA = Dora()
