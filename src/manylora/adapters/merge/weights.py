"""What each parameter of a base becomes: computed site by site in float32, when asked for, and not kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.adapters.merge.source import Place, Source
from manylora.adapters.merge.storage import Storage
from manylora.base.frozen import FrozenModel
from manylora.base.packing.quantise import choose_sites
from manylora.methods import METHODS
from manylora.types import Site

Onto = Callable[[Site, Tensor], Tensor]


class Weights:
    """The base's parameters before, the adapter's change of each, and what a storage keeps of their sum.

    `onto` gives the weight (O, I) that the adapter was trained on from a site that is packed and its published weight;
    None: that is the published weight.
    """

    def __init__(self, base: FrozenModel, adapter: Adapter, source: Source, onto: Onto | None = None):
        self.base = base
        self.adapter = adapter
        self.source = source
        self.onto = onto
        self._packable = _packable(base)
        self._place = {(place.site, place.parameter): place for place in source.places if place.site is not None}
        self.untied = self._untied()

    def factor_site(self, name: str) -> str | None:
        """The site whose factors change this one: itself, or the one whose copy it shares; None: unchanged."""
        name = self.adapter.tied.get(name, name)
        return name if name in self.adapter.factors else None

    def changed(self) -> list[Site]:
        """The sites that the adapter changes, in the base's order."""
        return [site for site in self.base.sites.values() if self.factor_site(site.name)]

    def _untied(self) -> tuple[str, ...]:
        """Sites that share a weight with another and no longer can: the adapter changes the two differently."""
        sites = self.base.sites.values()
        return tuple(
            site.name
            for site in sites
            if site.tied_to is not None and self.factor_site(site.name) != self.factor_site(site.tied_to)
        )

    def packs(self, site: Site) -> bool:
        """Whether a packed folder packs this site's weight."""
        return site.name in self._packable

    def place(self, site: Site, parameter: str) -> Place | None:
        """Where a parameter lies on disk; that of a tied weight is its owner's."""
        return self._place.get((site.name, parameter)) or self._place.get((site.tied_to or "", parameter))

    def before(self, site: Site, parameter: str) -> Tensor:
        """The parameter before merging, in the module's own layout, float32 or wider."""
        place = self.place(site, parameter)
        if place is None:
            value = site.parameters()[parameter].cpu()
        else:
            value = self.source.read(place)
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        if self.onto is not None and parameter == "weight" and self.packs(site):
            return site.own_layout(self.onto(site, site.kind.as_map(wide).contiguous()).to(wide))
        return wide

    def change(self, site: Site) -> Mapping[str, Tensor]:
        """The adapter's change of each parameter of a site; empty where it does not reach."""
        owner = self.factor_site(site.name)
        if owner is None:
            return {}
        factors = self.adapter.factors[owner]
        method = METHODS.get(factors.method)
        if not method.replaces:
            return method.delta(site, factors, self.adapter.spec)
        # A copy stands in place of the weight, whatever the weight was: also where that is read wider than loaded.
        own = site.parameters()
        changes = method.delta(site, factors, self.adapter.spec)
        return {
            name: own[name].cpu().to(value) + value - self.before(site, name).to(value)
            for name, value in changes.items()
        }

    def kept(self, site: Site, storage: Storage, *, with_change: bool = True) -> dict[str, Tensor]:
        """What a reader of the merged folder gets for each parameter of a site, float32 or wider."""
        changes = self.change(site) if with_change else {}
        return self.stored(site, storage, {name: self.before(site, name) for name in site.shapes()}, changes)

    def stored(
        self, site: Site, storage: Storage, before: Mapping[str, Tensor], changes: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What a storage gives back of a site's parameters and their changes."""
        kept = {}
        for name, value in before.items():
            place = self.place(site, name)
            dtype = self.source.main_dtype if place is None else place.dtype
            if name in changes:
                value = value + changes[name].to(value.dtype)
            packs = name == "weight" and self.packs(site)
            given = storage.kept(
                site.kind.as_map(value) if packs else value, dtype, self.source.main_dtype, packs=packs
            )
            kept[name] = site.own_layout(given) if packs else given
        return kept

    def keeps_all(self, site: Site, storage: Storage) -> bool:
        """Whether the merged folder's parameters of a site are the base's own, so that nothing stands in for them."""
        if self.factor_site(site.name) or (self.packs(site) and (storage.packing or self.onto)):
            return False
        places = [self.place(site, name) for name in site.shapes()]
        main = self.source.main_dtype
        return all(place is None or storage.dtype_for(place.dtype, main) == place.dtype for place in places)


def _packable(base: FrozenModel) -> frozenset[str]:
    """The sites whose weight a packed folder packs: those of a packed base, or those that packing it would choose."""
    packed = frozenset(site.name for site in base.sites.values() if site.packed is not None)
    return packed or frozenset(site.name for site in choose_sites(base.model, lambda name: False)[0])
