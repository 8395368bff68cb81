"""LoRA with a trained bias at each site, in PEFT's two kinds: one that belongs to factor b, and the site's own.

Source: the definitions of PEFT 0.21, `lora_bias=True` (y + s (B A x + c)) and `bias="lora_only"` (the site's bias is
trained in place).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from manylora.errors import SpecError
from manylora.gathering import gathered
from manylora.methods.lora import Lora
from manylora.spec import AdapterSpec
from manylora.types import Factors, Site, SiteKind, Stack, Start, Use


class _Biased(Lora):
    """Factors a (R, I), b (O, R) and bias (O,), which adds the same numbers to every output of a row."""

    low_rank = False
    key: str

    def adapts(self, kind: SiteKind) -> bool:
        return kind.product

    def stack_shapes(self, site: Site, shape_class: int) -> Mapping[str, tuple[int, ...]]:
        shapes = super().stack_shapes(site, shape_class)
        return {**shapes, "bias": site.out_in[:1]} if self.has_bias(site) else shapes

    def init(self, start: Start, spec: AdapterSpec) -> Factors:
        factors = super().init(start, spec)
        if not self.has_bias(start.site):
            return factors
        return replace(factors, tensors={**factors.tensors, "bias": self.fresh(start.site)})

    def stored(self, kind: SiteKind) -> Mapping[str, str]:
        return {**super().stored(kind), "bias": self.key}

    def delta(self, site: Site, factors: Factors, spec: AdapterSpec) -> Mapping[str, Tensor]:
        found = dict(super().delta(site, factors, spec))
        if "bias" in factors.tensors:
            if own_bias(site) is None:
                raise SpecError(
                    f"the adapter adds a bias at {site.name!r}, and the site has none that could take it",
                    next_step="use the adapter beside its base, unmerged",
                )
            found["bias"] = self.shift(site, factors.tensors["bias"][None], [spec.scale(site.name)])[0]
        return found

    def forward(
        self, x: Tensor, y: Tensor | None, site: Site, uses: Sequence[Use], extra: tuple[tuple, dict]
    ) -> Tensor:
        return self._shifted(super().forward(x, y, site, uses, extra), site, uses)

    def together(self, x: Tensor, sites: Sequence[tuple[Site, Sequence[Use]]]) -> Sequence[Tensor] | None:
        made = super().together(x, sites)
        if made is None:
            return None
        return [self._shifted(y, site, uses) for y, (site, uses) in zip(made, sites, strict=True)]

    @abstractmethod
    def has_bias(self, site: Site) -> bool:
        """Whether an adapter has one at this site."""

    @abstractmethod
    def fresh(self, site: Site) -> Tensor:
        """(O,) the tensor of a new adapter, which shifts nothing."""

    @abstractmethod
    def shift(self, site: Site, bias: Tensor, scales: Sequence[float]) -> Tensor:
        """(P, O) what is added to the outputs, of the tensors (P, O) of several places and the scale of each."""

    def _shifted(self, y: Tensor, site: Site, uses: Sequence[Use]) -> Tensor:
        out = y.reshape(-1, y.shape[-1])
        for use in uses:
            if "bias" in use.stack.tensors:
                out = self._with_shift(out, site, use.stack, use)
        return out.view(y.shape)

    def _with_shift(self, out: Tensor, site: Site, stack: Stack, use: Use) -> Tensor:
        shifts = self.shift(site, stack.tensors["bias"], stack.scales).to(out.dtype)
        pieces, reached = [], 0
        for segment in use.runs.segments:
            pieces += [out[reached : segment.start], out[segment.start : segment.stop] + shifts[segment.place]]
            reached = segment.stop
        return torch.cat([*pieces, out[reached:]])


class LoraBias(_Biased):
    """The bias belongs to b: it is scaled as B A is, and starts at zero. A site need not have one of its own."""

    name = "lora-bias"
    raised = frozenset({"b", "bias"})
    peft: Mapping[str, Any] | None = {"lora_bias": True}
    key = "lora_B.bias"

    def has_bias(self, site: Site) -> bool:
        return True

    def fresh(self, site: Site) -> Tensor:
        return torch.zeros(site.out_in[0])

    def shift(self, site: Site, bias: Tensor, scales: Sequence[float]) -> Tensor:
        return bias.new_tensor(scales)[:, None] * bias


class OwnBias(_Biased):
    """The bias stands in place of the site's own, where that has one, and starts there."""

    name = "lora-own-bias"
    optional = frozenset({"bias"})
    peft: Mapping[str, Any] | None = {"bias": "lora_only"}
    key = "base_layer.bias"

    def has_bias(self, site: Site) -> bool:
        return own_bias(site) is not None

    def fresh(self, site: Site) -> Tensor:
        own = own_bias(site)
        assert own is not None
        return own.to("cpu", torch.promote_types(own.dtype, torch.float32), copy=True)

    def shift(self, site: Site, bias: Tensor, scales: Sequence[float]) -> Tensor:
        with gathered(site.module):
            own = own_bias(site)
            assert own is not None
            return bias - own.to(bias)


def own_bias(site: Site) -> Tensor | None:
    """(O,) the bias of a site's module; None: it has none."""
    bias = site.module._parameters.get("bias")
    return None if bias is None else bias.detach()


LORA_BIAS = LoraBias()
OWN_BIAS = OwnBias()
