"""An adapter as a value: what it is, its factors by site, and the base it was made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from manylora.adapters.peft.config import task_type_of
from manylora.base.original import Originals
from manylora.base.sites import check_patterns, match_sites
from manylora.errors import SpecError
from manylora.gathering import gathered
from manylora.methods import METHODS, WHOLE_COPY
from manylora.methods.inits import INITS
from manylora.ops.dropout import mix, site_key
from manylora.spec import AdapterSpec
from manylora.types import Factors, Site, Start

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel


@dataclass(frozen=True, slots=True)
class Adapter:
    """A spec whose sites are spelled out, factors by site name, the fingerprint of the base (None: unknown)."""

    spec: AdapterSpec
    factors: Mapping[str, Factors]
    base_name: str = ""
    base_fingerprint: str | None = None
    receipt: Mapping[str, Any] = field(default_factory=dict)
    capped: Mapping[str, int] = field(default_factory=dict)
    """Sites whose own size held the rank below what was asked, and the rank they got."""
    kinds: Mapping[str, str] = field(default_factory=dict)
    """Low-rank sites that are no plain linear map, and what they are, by the names of `base.kinds`."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """Names in `spec.full_sites` without factors of their own, and the site whose copy they share."""
    record: Mapping[str, Any] = field(default_factory=dict)
    """What the task that it was trained for says of itself, {}: nothing."""
    task_type: str | None = None
    """PEFT's word for what the base computes, None: not said."""
    targets: tuple[str, ...] | str | None = None
    """By PEFT's rule, the modules of its base that a folder says to have factors for: endings of names, or one regular
    expression for whole names. None: it does not say, or leaves some of them out again."""

    @classmethod
    def new(
        cls, base: FrozenModel, spec: AdapterSpec, *, seed: int = 0, inputs: Mapping[str, Any] | None = None
    ) -> Adapter:
        """A fresh adapter on a base; its factors are a pure function of (seed, site).

        A rank above what some sites allow is capped there with the scale kept. `inputs` is what an init that reads data
        has found of the inputs of each site, by name; ranks may follow from it, again with the scales kept.

        Raises:
            SiteNotFound: a pattern matches nothing. SpecError: the rank is above what every site allows, the init needs
            a packed base or data. BaseNotFound: the init needs the weights before packing, and they are not at hand.
        """
        picked, full, capped, resolved = _resolve(base, spec)
        picked, resolved = _with_ranks_of(inputs, picked, resolved)
        method, originals, factors = METHODS.get(spec.method), Originals(base), {}
        for site in picked:
            with gathered(site.module):
                factors[site.name] = method.init(_start(site, resolved, seed, originals, inputs), resolved)
        for name, site in full.items():
            if site.tied_to in full:
                continue  # tied weights that are both copied share the copy of the first
            factors[name] = METHODS.get(WHOLE_COPY).init(_start(site, resolved, seed, originals), resolved)
        resolved = replace(
            resolved, sites=tuple(s.name for s in picked), exclude=(), layers=None, full_sites=tuple(full)
        )
        return cls(
            resolved,
            factors,
            base.name,
            base.fingerprint,
            capped=capped,
            kinds={site.name: site.kind.name for site in picked if site.kind.name != "linear"},
            tied={
                name: site.tied_to for name, site in full.items() if site.tied_to is not None and site.tied_to in full
            },
            task_type=task_type_of(base.model, base.sites, full),
        )

    @classmethod
    def shaped(cls, base: FrozenModel, spec: AdapterSpec) -> Adapter:
        """An adapter of the shapes that `new` gives: for whoever has its numbers, or needs none.

        It reads no weight for its init and no data; where ranks follow from the data, they are those of `spec`.
        """
        like = cls.new(base, replace(spec, init="default"))
        factors = dict(like.factors)
        if INITS.get(spec.init).anchored:
            for name in like.spec.sites:
                own = factors[name]
                anchors = {key: own.tensors[key].clone() for key in ("a", "b")}
                factors[name] = replace(own, anchors=anchors)
        return replace(like, spec=replace(like.spec, init=spec.init), factors=factors)

    @staticmethod
    def check(base: FrozenModel, spec: AdapterSpec) -> dict[str, int]:
        """Raise what `new` would of the spec itself, without drawing factors.

        Returns the names of the sites that it stands on and their ranks, 0 of whole copies; an init that reads data may
        share these out otherwise.
        """
        picked, full, _, resolved = _resolve(base, spec)
        return {site.name: resolved.rank_at(site.name) for site in picked} | dict.fromkeys(full, 0)

    @classmethod
    def load(cls, folder: str | Path) -> Adapter:
        """An adapter from a folder in PEFT's format, written here or by PEFT.

        Raises:
            AdapterBroken: a file is missing or is not what its name says; a setting that cannot be honoured.
        """
        from manylora.adapters.peft.store import load_adapter

        return load_adapter(Path(folder))

    def save(self, folder: str | Path, base: FrozenModel | None = None) -> Path:
        """Write the folder that PEFT opens; with `base` given, its tokenizer and the receipt's checks too.

        Raises:
            OutputExists: the folder already holds an adapter.
        """
        from manylora.adapters.peft.store import save_adapter

        return save_adapter(self, Path(folder), base)

    @classmethod
    def of(cls, base: FrozenModel, spec: AdapterSpec, factors: Mapping[str, Factors]) -> Adapter:
        """Low-rank factors that were made elsewhere as an adapter of a base, with the ranks and scales that they have.

        `spec` gives method, alpha and the scale at each site; its sites are those of the factors.
        """
        resolved = replace(spec, sites=tuple(factors), exclude=(), layers=None)
        for name, own in factors.items():
            if METHODS.get(own.method).rank(own) != resolved.rank_at(name):
                resolved = resolved.with_rank_at(name, METHODS.get(own.method).rank(own))
        kinds = {n: base.sites[n].kind.name for n in factors if base.sites[n].kind.name != "linear"}
        task_type = task_type_of(base.model, base.sites, ())
        return cls(resolved, factors, base.name, base.fingerprint, kinds=kinds, task_type=task_type)

    def plain(self) -> Adapter:
        """The same map in ordinary factors: on their grid where they are used there, of twice the rank without anchors.

        Semantics: `B A - B0 A0 = [B - B0, B0] [A; A - A0]`, the scale kept. Other tools compute this without anchors;
        [B, -B0] [A; A0] would be the same map, and in few bits the difference of two large products.
        """
        if self.spec.quantize is None and not any(own.anchors for own in self.factors.values()):
            return self
        factors, spec = dict(self.factors), replace(self.spec, quantize=None)
        grown: dict[str, int] = {}
        for name, own in self.factors.items():
            method = METHODS.get(own.method)
            factors[name] = method.plain(own, self.spec)
            if (rank := method.rank(factors[name])) != method.rank(own):
                grown[name] = rank
        if grown:
            spec = replace(spec, init="default")
        times = {rank // spec.rank_at(name) for name, rank in grown.items()}
        if len(grown) == len(spec.sites) and len(times) == 1:
            spec = spec.with_ranks_times(times.pop())
        else:
            for name, rank in grown.items():
                spec = spec.with_rank_at(name, rank)
        return replace(self, spec=spec, factors=factors)

    def kind_at(self, site: str) -> str:
        """The name of the kind of map that a low-rank site is."""
        return self.kinds.get(site, "linear")

    def num_parameters(self) -> int:
        """Trained numbers."""
        return sum(factors.num_parameters() for factors in self.factors.values())


def _resolve(base: FrozenModel, spec: AdapterSpec) -> tuple[list[Site], dict[str, Site], dict[str, int], AdapterSpec]:
    """Sites that get low-rank factors, sites that are copied, ranks that were capped, and the spec with those ranks."""
    method = METHODS.get(spec.method)
    if spec.quantize is not None and INITS.get(spec.init).anchored:
        raise SpecError(
            f"quantize is {spec.quantize!r}, and init {spec.init!r} keeps its start as anchors, on no grid",
            next_step="choose init default or gaussian, or compress the adapter once it is trained",
        )
    if spec.quantize is not None and method.factored and not method.low_rank:
        raise SpecError(
            f"quantize is {spec.quantize!r}, and an adapter of the method {spec.method!r} is not stored in few bits",
            allowed=", ".join(name for name in METHODS if METHODS.get(name).low_rank),
            next_step="leave adapter.quantize out",
        )
    full = {site.name: site for site in _full_sites(base, spec)}
    if not spec.sites and full:
        picked: list[Site] = []
    else:
        picked = match_sites(base.sites, spec.sites, exclude=spec.exclude, layers=spec.layers, adapts=method.adapts)
    if method.replaces:
        full |= {site.name: site for site in picked}
        picked = []
    picked = [site for site in picked if site.name not in full]
    if picked and INITS.get(spec.init).needs_packed and all(site.packed is None for site in picked):
        raise SpecError(
            f"init {spec.init!r} starts from what packing has lost, and none of the {len(picked)} sites is packed",
            allowed=", ".join(name for name in INITS if not INITS.get(name).needs_packed),
            next_step="pack the base (quantize: nf4), or choose another adapter.init",
        )
    _refuse_unreadable(picked, spec)
    for key, patterns in (("rank_pattern", spec.rank_pattern), ("alpha_pattern", spec.alpha_pattern)):
        if picked:
            check_patterns(key, patterns, [site.name for site in picked])
    capped, resolved = _cap(picked, spec)
    return picked, full, capped, resolved


def _refuse_unreadable(sites: Sequence[Site], spec: AdapterSpec) -> None:
    """An init that reads data is given the inputs of products of items."""
    if INITS.get(spec.init).reads is None:
        return
    for site in sites:
        if not site.kind.product:
            raise SpecError(
                f"init {spec.init!r} starts from the inputs of linear maps, and {site.name!r} is of the kind "
                f"{site.kind.name!r}",
                allowed="sites: all-linear, or names of linear maps",
                next_step=f"leave {site.name!r} out, copy it whole (adapter.full_sites), or choose another init",
            )


def _with_ranks_of(
    inputs: Mapping[str, Any] | None, sites: list[Site], spec: AdapterSpec
) -> tuple[list[Site], AdapterSpec]:
    """The sites that are left, and the spec with the ranks that an init gives them by what it found in the data."""
    reads = INITS.get(spec.init).reads
    if reads is None or not sites:
        return sites, spec
    if inputs is None:
        raise SpecError(
            f"init {spec.init!r} reads data, and an adapter is made here without any",
            allowed=", ".join(name for name in INITS if INITS.get(name).reads is None),
            next_step="manylora.train reads it from the rows of data.train; or choose another init",
        )
    ranks = reads.ranks(sites, inputs, spec)
    for name, rank in ranks.items():
        if rank and rank != spec.rank_at(name):
            spec = spec.with_rank_at(name, rank)
    return [site for site in sites if ranks[site.name]], spec


def _start(
    site: Site, spec: AdapterSpec, seed: int, originals: Originals, inputs: Mapping[str, Any] | None = None
) -> Start:
    return Start(
        site=site,
        rank=spec.rank_at(site.name),
        scale=spec.scale(site.name),
        generator=torch.Generator().manual_seed(mix(seed, site_key(site.name)) >> 1),
        original=partial(originals.weight, site),
        inputs=None if inputs is None else inputs[site.name],
    )


def _full_sites(base: FrozenModel, spec: AdapterSpec) -> list[Site]:
    """Those that are named, and every head that the base lacks: an adapter without one would have no answers."""
    named = match_sites(base.sites, spec.full_sites) if spec.full_sites else []
    return [*named, *(site for site in base.lacking if site not in named)]


def _cap(sites: list[Site], spec: AdapterSpec) -> tuple[dict[str, int], AdapterSpec]:
    limits = {site.name: min(site.out_in) for site in sites}
    over = {name: limit for name, limit in limits.items() if spec.rank_at(name) > limit}
    if over and len(over) == len(limits):
        raise SpecError(
            f"rank {spec.rank} is above what every one of the {len(limits)} sites allows",
            allowed=f"1 to {max(limits.values())}",
            next_step="lower adapter.rank, or train whole copies with adapter.method: full",
        )
    for name, limit in over.items():
        spec = spec.with_rank_at(name, limit)
    return over, spec
