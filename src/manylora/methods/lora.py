"""LoRA: the change of a weight is s B A, of rank R; with anchors, where an init gives them, s (B A - B0 A0).

Source: LoRA (2106.09685), section 4; scale rules: spec.AdapterSpec.scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from manylora.errors import SpecError
from manylora.methods.inits import INITS
from manylora.methods.inits.init import Start
from manylora.ops.low_rank import low_rank, low_rank_together, widened
from manylora.ops.rounding import fake_quantised
from manylora.spec import AdapterSpec
from manylora.types import Factors, Site, SiteKind, Use


class Lora:
    """Factors a (R, I) and b (O, R); for an embedding a (R, V) and b (D, R)."""

    name = "lora"
    kinds: tuple[SiteKind, ...] = ("linear", "conv1d", "embedding")
    replaces = False

    def num_items(self, site: Site, x: Tensor) -> int:
        return x.numel() if site.kind == "embedding" else x.numel() // x.shape[-1]

    def rank(self, factors: Factors) -> int:
        return factors.tensors["a"].shape[0]

    def shape_class(self, site: Site, factors: Factors) -> int:
        """The rank, padded to the next power of two: a zero row of a meets a zero column of b, so both stay zero."""
        return 1 << (factors.tensors["a"].shape[0] - 1).bit_length()

    def stack_shapes(self, site: Site, shape_class: int) -> Mapping[str, tuple[int, ...]]:
        rows, columns = site.out_in
        return {"a": (shape_class, columns), "b": (rows, shape_class)}

    def init(
        self, site: Site, rank: int, spec: AdapterSpec, generator: torch.Generator, original: Callable[[], Tensor]
    ) -> Factors:
        rows, columns = site.out_in
        if rank > min(rows, columns):
            raise SpecError(
                f"rank {rank} at {site.name!r}, a map of {rows} x {columns}", allowed=f"1 to {min(rows, columns)}"
            )
        init = INITS.get(spec.init)
        a, b = (factor.cpu() for factor in init.draw(Start(site, rank, spec.scale(site.name), generator, original)))
        anchors = {"a": a.clone(), "b": b.clone()} if init.anchored else {}
        return Factors(self.name, {"a": a, "b": b}, anchors)

    def delta(self, site: Site, factors: Factors, spec: AdapterSpec) -> Mapping[str, Tensor]:
        a, b = factors.tensors["a"], factors.tensors["b"]
        if factors.anchors:
            a, b = widened(a, b, factors.anchors["a"], factors.anchors["b"])
        else:
            a, b = fake_quantised(a, b, spec.quantize)
        change = spec.scale(site.name) * (b @ a)
        return {"weight": change.t() if site.kind in ("conv1d", "embedding") else change}

    def forward(
        self, x: Tensor, y: Tensor | None, site: Site, uses: Sequence[Use], extra: tuple[tuple, dict]
    ) -> Tensor:
        if site.kind == "embedding":
            return self._embed(x, site.map(x, *extra[0], **extra[1]) if y is None else y, site, uses)
        if y is None and site.plain:
            return low_rank(x, site, uses, with_base=True, extra=extra)
        y = site.map(x, *extra[0], **extra[1]) if y is None else y
        return y + low_rank(x, site, uses, with_base=False).to(y.dtype)

    def together(self, x: Tensor, sites: Sequence[tuple[Site, Sequence[Use]]]) -> Sequence[Tensor] | None:
        if all(site.plain and site.kind != "embedding" for site, _ in sites):
            return low_rank_together(x, sites)
        return None

    @staticmethod
    def _embed(tokens: Tensor, y: Tensor, site: Site, uses: Sequence[Use]) -> Tensor:
        """The update of an embedding: rows of A^T looked up by token, then B. Dropout does not apply, as in PEFT."""
        flat, out = tokens.reshape(-1), y.reshape(tokens.numel(), -1)
        scale_own = getattr(site.module, "embed_scale", None)
        for use in uses:
            pieces, reached = [], 0
            for segment in use.runs.segments:
                a, b = use.stack.tensors["a"][segment.place], use.stack.tensors["b"][segment.place]
                if use.stack.anchors:
                    a, b = widened(a, b, use.stack.anchors["a"][segment.place], use.stack.anchors["b"][segment.place])
                else:
                    a, b = fake_quantised(a, b, use.stack.rounding)
                found = functional.embedding(flat[segment.start : segment.stop], a.t())
                update = use.stack.scales[segment.place] * (found @ b.t())
                if scale_own is not None:
                    update = update * scale_own
                pieces += [out[reached : segment.start], out[segment.start : segment.stop] + update.to(out.dtype)]
                reached = segment.stop
            out = torch.cat([*pieces, out[reached:]])
        return out.view(y.shape)


LORA = Lora()
