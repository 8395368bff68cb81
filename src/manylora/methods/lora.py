"""LoRA: the change of a weight is s B A, of rank R; with anchors, where an init gives them, s (B A - B0 A0).

Source: LoRA (2106.09685), section 4; scale rules: spec.AdapterSpec.scale.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manylora.errors import SpecError
from manylora.methods.inits import INITS
from manylora.ops.low_rank import low_rank, low_rank_together, segment_mask, widened
from manylora.ops.rounding import fake_quantised
from manylora.spec import AdapterSpec
from manylora.types import Factors, Segment, Site, SiteKind, Stack, Start, Use


class Lora:
    """Factors a (R, I) and b (O, R); for an embedding a (R, V) and b (D, R)."""

    name = "lora"
    replaces = False
    factored = True
    low_rank = True
    # Source: LoRA+ (2402.12354). An entry of a's output adds up as many terms as the input is wide, one of b's only R,
    # so under Adam a needs a rate that falls with the width and b one that does not; it is so whichever of them starts
    # at zero (the paper's Init[1] and Init[2]). An embedding's input has one term: there the ratio only makes b, again
    # the factor at the output, faster than a.
    raised = frozenset({"b"})
    optional: frozenset[str] = frozenset()
    peft: Mapping[str, Any] | None = {}

    def adapts(self, kind: SiteKind) -> bool:
        return kind.maps

    def num_items(self, site: Site, x: Tensor) -> int:
        return site.kind.num_items(x)

    def rank(self, factors: Factors) -> int:
        return factors.tensors["a"].shape[0]

    def shape_class(self, site: Site, factors: Factors) -> int:
        """The rank, padded to the next power of two: a zero row of a meets a zero column of b, so both stay zero."""
        return 1 << (factors.tensors["a"].shape[0] - 1).bit_length()

    def stack_shapes(self, site: Site, shape_class: int) -> Mapping[str, tuple[int, ...]]:
        return site.kind.factor_shapes(site.shapes()["weight"], shape_class)

    def init(self, start: Start, spec: AdapterSpec) -> Factors:
        site, (rows, columns) = start.site, start.site.out_in
        if start.rank > min(rows, columns):
            raise SpecError(
                f"rank {start.rank} at {site.name!r}, a map of {rows} x {columns}", allowed=f"1 to {min(rows, columns)}"
            )
        init = INITS.get(spec.init)
        shapes = site.kind.factor_shapes(site.shapes()["weight"], start.rank)
        drawn = init.draw(start)
        a, b = (factor.cpu().reshape(shapes[name]) for name, factor in zip("ab", drawn, strict=True))
        anchors = {"a": a.clone(), "b": b.clone()} if init.anchored else {}
        return Factors(self.name, {"a": a, "b": b}, anchors)

    def product(self, factors: Factors) -> tuple[Tensor, Tensor]:
        return factors.tensors["a"].flatten(1), factors.tensors["b"].flatten(1)

    def of_product(self, a: Tensor, b: Tensor, like: Factors) -> Factors:
        shapes = {name: tensor.shape for name, tensor in like.tensors.items()}
        made = {"a": a.reshape(-1, *shapes["a"][1:]), "b": b.reshape(len(b), -1, *shapes["b"][2:])}
        return replace(like, tensors=dict(like.tensors) | made, anchors={})

    def plain(self, factors: Factors, spec: AdapterSpec) -> Factors:
        return self.of_product(*used(factors, spec.quantize), like=factors)

    def stored(self, kind: SiteKind) -> Mapping[str, str]:
        return kind.stored

    def delta(self, site: Site, factors: Factors, spec: AdapterSpec) -> Mapping[str, Tensor]:
        a, b = used(factors, spec.quantize)
        return {"weight": site.own_layout(spec.scale(site.name) * (b @ a))}

    def forward(
        self, x: Tensor, y: Tensor | None, site: Site, uses: Sequence[Use], extra: tuple[tuple, dict]
    ) -> Tensor:
        if not site.kind.product:
            return self._by_segment(x, site.map(x, *extra[0], **extra[1]) if y is None else y, site, uses)
        if y is None and site.plain:
            return low_rank(x, site, uses, with_base=True, extra=extra)
        y = site.map(x, *extra[0], **extra[1]) if y is None else y
        return y + low_rank(x, site, uses, with_base=False).to(y.dtype)

    def together(self, x: Tensor, sites: Sequence[tuple[Site, Sequence[Use]]]) -> Sequence[Tensor] | None:
        if all(site.plain and site.kind.product for site, _ in sites):
            return low_rank_together(x, sites)
        return None

    @staticmethod
    def _by_segment(x: Tensor, y: Tensor, site: Site, uses: Sequence[Use]) -> Tensor:
        """The update of a map that is no product of items with a matrix, segment by segment, in autograd."""
        items = site.kind.items(x)
        out = y.reshape(len(items), -1)
        for use in uses:
            pieces, reached = [], 0
            for segment in use.runs.segments:
                part = items[segment.start : segment.stop]
                if site.kind.drops_input:
                    part = _dropped(part, segment, use.stack)
                a, b = _factors_at(use.stack, segment.place)
                update = site.kind.low_rank(part, a, b, use.stack.scales[segment.place], site.module)
                update = update.reshape(len(part), -1).to(out.dtype)
                pieces += [out[reached : segment.start], out[segment.start : segment.stop] + update]
                reached = segment.stop
            out = torch.cat([*pieces, out[reached:]])
        return out.view(y.shape)


def used(factors: Factors, quantize: str | None) -> tuple[Tensor, Tensor]:
    """The matrices (R, in) and (out, R) whose product the factors amount to, as they are used."""
    a, b = factors.tensors["a"].flatten(1), factors.tensors["b"].flatten(1)
    if factors.anchors:
        return widened(a, b, factors.anchors["a"].flatten(1), factors.anchors["b"].flatten(1))
    return fake_quantised(a, b, quantize)


def _factors_at(stack: Stack, place: int) -> tuple[Tensor, Tensor]:
    """What one place's factors are used as, in the shapes that the site's kind gives them."""
    tensors, anchors = ({n: t[place] for n, t in held.items()} for held in (stack.tensors, stack.anchors))
    a, b = used(Factors(stack.method, tensors, anchors), stack.rounding)
    return a.reshape(-1, *tensors["a"].shape[1:]), b.reshape(len(b), -1, *tensors["b"].shape[2:])


def _dropped(items: Tensor, segment: Segment, stack: Stack) -> Tensor:
    """Items after the dropout of their rows."""
    mask = segment_mask(segment, stack, items.flatten(1))
    return items if mask is None else items * mask.view(items.shape)


LORA = Lora()
