"""A trained copy of a site: every parameter of the module, its bias too, in float32, cast to the compute dtype.

Used for heads (PEFT's `modules_to_save`) and, on every site, for full fine-tuning as an honest comparison.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from manylora.errors import SpecError
from manylora.forwards import run_with
from manylora.spec import AdapterSpec
from manylora.types import Factors, Site, SiteKind, Start, Use

HEAD_STD = 0.02
"""The spread of fresh weights, `initializer_range` of most models of transformers."""


class Full:
    """Factors: one tensor per parameter of the site's module, by the module's own names and shapes.

    A packed weight is a parameter like any other: its copy starts as the dense weight that the codes stand for.
    """

    name = "full"
    replaces = True
    factored = False
    low_rank = False
    raised: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    peft: Mapping[str, Any] | None = None

    def adapts(self, kind: SiteKind) -> bool:
        return True

    def num_items(self, site: Site, x: Tensor) -> int:
        return x.shape[0]

    def rank(self, factors: Factors) -> int:
        return 0

    def shape_class(self, site: Site, factors: Factors) -> int:
        """0, or the outputs of a head that the base lacks: adapters of one base may have heads of other widths."""
        for name, dimension in (site.lacks or {}).items():
            if dimension is not None:
                return factors.tensors[name].shape[dimension]
        return 0

    def stack_shapes(self, site: Site, shape_class: int) -> Mapping[str, tuple[int, ...]]:
        return site.shapes(shape_class)

    def init(self, start: Start, spec: AdapterSpec) -> Factors:
        if start.site.lacks is not None:
            return Factors(self.name, _drawn_head(start.site, spec.outputs, start.generator))
        copies = {}
        for name, value in start.site.parameters().items():
            master = value.to("cpu", torch.promote_types(value.dtype, torch.float32))
            copies[name] = master.clone(memory_format=torch.contiguous_format)
        return Factors(self.name, copies)

    def product(self, factors: Factors) -> tuple[Tensor, Tensor]:
        raise TypeError("a whole copy has no factors a and b")

    def of_product(self, a: Tensor, b: Tensor, like: Factors) -> Factors:
        raise TypeError("a whole copy has no factors a and b")

    def plain(self, factors: Factors, spec: AdapterSpec) -> Factors:
        return factors

    def stored(self, kind: SiteKind) -> Mapping[str, str]:
        return {}

    def delta(self, site: Site, factors: Factors, spec: AdapterSpec) -> Mapping[str, Tensor]:
        own = site.parameters()
        return {name: value - own[name].to(value) for name, value in factors.tensors.items()}

    def forward(
        self, x: Tensor, y: Tensor | None, site: Site, uses: Sequence[Use], extra: tuple[tuple, dict]
    ) -> Tensor:
        whole = len(uses) == 1 and uses[0].runs.covers_all and len(uses[0].runs.segments) == 1
        if whole:
            return self._apply(x, site, uses[0], uses[0].runs.segments[0].place, extra)
        y = site.map(x, *extra[0], **extra[1]) if y is None else y
        for use in uses:
            pieces, reached = [], 0
            for segment in use.runs.segments:
                part = self._apply(x[segment.start : segment.stop], site, use, segment.place, extra)
                pieces += [y[reached : segment.start], part]
                reached = segment.stop
            y = torch.cat([*pieces, y[reached:]])
        return y

    def together(self, x: Tensor, sites: Sequence[tuple[Site, Sequence[Use]]]) -> None:
        return None

    @staticmethod
    def _apply(x: Tensor, site: Site, use: Use, place: int, extra: tuple[tuple, dict]) -> Tensor:
        """The module's own forward with the slot's parameters in place of the frozen ones."""
        module: Any = site.module if site.packed is None else site.module.twin()  # pyright: ignore[reportCallIssue]
        own = dict(module.named_parameters(recurse=False))
        cast = {name: tensor[place].to(own[name].dtype) for name, tensor in use.stack.tensors.items()}
        return run_with(module, cast, x, *extra[0], **extra[1])


def _drawn_head(site: Site, outputs: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """A fresh head: matrices N(0, HEAD_STD^2), what scales one, what is added zero."""
    varies = any(dimension is not None for dimension in (site.lacks or {}).values())
    if varies and outputs is None:
        raise SpecError(
            f"the base lacks {site.name!r}, and it is not said how many outputs an adapter's own has",
            next_step="AdapterSpec(outputs=...); a task knows it from its data",
        )
    drawn = {}
    for name, shape in site.shapes(outputs).items():
        if len(shape) > 1:
            drawn[name] = HEAD_STD * torch.randn(shape, generator=generator)
        else:
            drawn[name] = torch.ones(shape) if name == "weight" else torch.zeros(shape)
    return drawn


FULL = Full()
