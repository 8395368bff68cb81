"""An adapter made smaller, as a pure function: fewer components, fewer bits, and what each site lost by it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.adapters.compress.scheme import Part
from manylora.adapters.compress.schemes import SCHEMES
from manylora.adapters.compress.spectrum import components, count_for, difference_norm, halves, product_norm
from manylora.adapters.compress.split import RHO
from manylora.errors import AdapterBroken, ConfigError
from manylora.methods import METHODS
from manylora.spec import AdapterSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How an adapter is made smaller. `scheme`: how factors are stored (None: float32). `rank`: the most components of
    a site; `energy`: the share of a site's sigma^2 that is kept. `rho`: the share that `split` stores in two bits."""

    scheme: str | None = None
    rank: int | None = None
    energy: float | None = None
    rho: float = RHO

    def __post_init__(self) -> None:
        if self.scheme is not None:
            SCHEMES.get(self.scheme).settings(self.options)
        if self.rank is not None and self.energy is not None:
            raise ConfigError("rank and energy are both given", allowed="one of the two")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"rank is {self.rank}", allowed="1 or more")
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise ConfigError(f"energy is {self.energy!r}", allowed="above 0, at most 1", next_step="try 0.99")
        if self.scheme is None and not self.cuts:
            raise ConfigError("nothing is asked for", allowed="bits, rank, energy", next_step="try bits 8")

    @property
    def cuts(self) -> bool:
        return self.rank is not None or self.energy is not None

    @property
    def options(self) -> dict[str, Any]:
        """What a scheme is told."""
        return {"rho": self.rho}


@dataclass(frozen=True, slots=True)
class SiteLoss:
    """`error`: |delta - delta'| / |delta|, Frobenius; None where delta is zero. `bits`: for each number of the smaller
    factors, scales counted."""

    site: str
    rank_before: int
    rank: int
    error: float | None
    bits: float


@dataclass(frozen=True, slots=True)
class Reduced:
    """`adapter` is what a reader of the file gets; `coded` are the tensors of A and of B by site, {} without a scheme.

    `error`: of all sites together, relative. `sites`: worst first. Bytes are those of tensors, without file headers:
    `copies_bytes` of them are whole copies of sites, which stay as they are.
    """

    recipe: Recipe
    adapter: Adapter
    coded: Mapping[str, tuple[dict[str, Tensor], dict[str, Tensor]]]
    sites: tuple[SiteLoss, ...]
    error: float | None
    num_parameters: int
    factor_bytes: int
    copies_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.factor_bytes + self.copies_bytes

    @property
    def bits(self) -> float:
        """Bits for each number of the factors, scales and padding counted."""
        return 8 * self.factor_bytes / self.num_parameters


def reduced(adapter: Adapter, recipe: Recipe) -> Reduced:
    """The adapter by a recipe. The scale at every site stays what it was, whatever its rank becomes.

    Whole copies of sites are not touched: what eight bits lose of a weight is as large as the little that training
    changed in it.

    Raises:
        AdapterBroken: there are no low-rank factors, or factors of a method that is not compressed here.
    """
    adapter = adapter.plain()
    names = _low_rank(adapter)
    factors, coded, losses = dict(adapter.factors), {}, []
    lost, whole, factor_bytes = 0.0, 0.0, 0
    for name in names:
        own = factors[name]
        a, b = METHODS.get(own.method).product(own)
        if recipe.scheme is None:
            new_a, new_b = (value.float() for value in _cut(a, b, recipe))
            size = new_a.nbytes + new_b.nbytes
        else:
            coded[name], (new_a, new_b) = _coded(_cut(a, b, recipe), recipe.scheme, recipe, name)
            size = sum(value.nbytes for part in coded[name] for value in part.values())
        scale = adapter.spec.scale(name)
        norm, off = scale * product_norm(a, b), scale * difference_norm(a, b, new_a, new_b)
        bits = 8 * size / (new_a.numel() + new_b.numel())
        losses.append(SiteLoss(name, a.shape[0], new_a.shape[0], off / norm if norm else None, bits))
        lost, whole, factor_bytes = lost + off**2, whole + norm**2, factor_bytes + size
        factors[name] = METHODS.get(own.method).of_product(new_a, new_b, like=own)
    ranks = {name: METHODS.get(factors[name].method).rank(factors[name]) for name in names}
    spec = _with_ranks(adapter.spec, ranks)
    copies = [value for name, own in factors.items() if name not in names for value in own.tensors.values()]
    return Reduced(
        recipe,
        replace(adapter, spec=spec, factors=factors),
        coded,
        tuple(sorted(losses, key=lambda loss: -1.0 if loss.error is None else loss.error, reverse=True)),
        math.sqrt(lost / whole) if whole else None,
        sum(factors[name].num_parameters() for name in names),
        factor_bytes,
        sum(value.nbytes for value in copies),
    )


def _low_rank(adapter: Adapter) -> list[str]:
    for name, own in adapter.factors.items():
        method = METHODS.get(own.method)
        if method.factored and not method.low_rank:
            raise AdapterBroken(
                f"{name!r} has factors of the method {own.method!r}, whose change is more than their product",
                allowed=", ".join(known for known in METHODS if METHODS.get(known).low_rank),
                next_step="merge it instead: manylora merge ADAPTER --into bf16 --output DIR",
            )
    names = [name for name, own in adapter.factors.items() if METHODS.get(own.method).low_rank]
    if not names:
        raise AdapterBroken(
            "the adapter has no low-rank factors, so there is nothing to compress", allowed="an adapter with factors"
        )
    return names


def _cut(a: Tensor, b: Tensor, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """The leading components as factors; the same factors where all are kept."""
    rank = a.shape[0]
    if not recipe.cuts or (recipe.rank is not None and recipe.rank >= rank):
        return a, b
    u, sigma, v = components(a, b)
    kept = recipe.rank if recipe.energy is None else count_for(sigma, recipe.energy)
    if kept is None or kept >= rank:
        return a, b
    return halves(u[:, :kept], sigma[:kept], v[:kept])


def _coded(
    pair: tuple[Tensor, Tensor], name: str, recipe: Recipe, site: str
) -> tuple[tuple[dict[str, Tensor], dict[str, Tensor]], tuple[Tensor, Tensor]]:
    """The stored tensors of a pair of factors, and the factors that they stand for."""
    scheme = SCHEMES.get(name)
    parts = scheme.encode(*pair, recipe.options)
    settings, rank = scheme.settings(recipe.options), pair[0].shape[0]
    read_a = scheme.decode(Part(f"A of {site!r}", rank, pair[0].shape[1], dict(parts[0])), settings)
    read_b = scheme.decode(Part(f"B of {site!r}", rank, pair[1].shape[0], dict(parts[1])), settings)
    return parts, (read_a, read_b.t().contiguous())


def _with_ranks(spec: AdapterSpec, ranks: Mapping[str, int]) -> AdapterSpec:
    """The spec with these ranks at its sites and every scale unchanged; what is not commonest becomes patterns."""
    if all(spec.rank_at(name) == rank for name, rank in ranks.items()):
        return spec
    wanted = {name: (rank, spec.scale(name)) for name, rank in ranks.items()}
    common = Counter(wanted.values()).most_common(1)[0][0]
    odd = [name for name, own in wanted.items() if own != common]
    made = spec
    # A pattern matches the end of a name: where one site's name ends another's, all have patterns, the longest first.
    for named in (odd, list(wanted)):
        ordered = sorted(named, key=len, reverse=True)
        made = replace(
            spec,
            rank=common[0],
            alpha=_alpha(spec, *common),
            rank_pattern={re.escape(name): wanted[name][0] for name in ordered},
            alpha_pattern={re.escape(name): _alpha(spec, *wanted[name]) for name in ordered},
        )
        if all((made.rank_at(name), round(made.scale(name) / scale, 9)) == (rank, 1.0)
               for name, (rank, scale) in wanted.items()):  # fmt: skip
            break
    return made


def _alpha(spec: AdapterSpec, rank: int, scale: float) -> float:
    return scale * (rank if spec.scale_rule == "alpha/rank" else math.sqrt(rank))
