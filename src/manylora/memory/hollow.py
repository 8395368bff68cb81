"""A base whose weights are fake for a while: what is computed on it takes no room and no time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from manylora.base.language import LanguageBase
from manylora.base.packing.linear import pack_module, put_module
from manylora.base.packing.quantise import choose_sites, packer
from manylora.base.sites import find_sites
from manylora.quant import backend

if TYPE_CHECKING:
    from manylora.memory.trace import Trace


@dataclass(slots=True)
class HollowBase:
    """A base whose weights were never read; `format` is what its linear weights are to be packed in (None: dense).

    `file_bytes` are those of the files that hold the weights, 0 where they are not at hand.
    """

    base: LanguageBase
    in_float32: Callable[[str], bool]
    format: str | None
    file_bytes: int
    notes: list[str]

    def packed_sites(self) -> dict[str, str]:
        """The formats of the sites whose weights are to be packed, by name."""
        held = {site.name: site.packed.format for site in self.base.sites.values() if site.packed is not None}
        if self.format is None:
            return held
        return held | {site.name: self.format for site in choose_sites(self.base.model, self.in_float32)[0]}


def hollow_of(base: Any) -> HollowBase:
    """A base that was loaded, with its weights as they are stored."""
    return HollowBase(base, lambda name: False, None, 0, [])


@contextmanager
def without_weights(hollow: HollowBase, trace: Trace) -> Iterator[LanguageBase]:
    """Within it the base's weights are fake, and packed where they are to be; afterwards they are as before."""
    base, held, modules = hollow.base, [], []
    known = base._fingerprint
    base._fingerprint = known or "planned"  # to find it out would read the weights
    try:
        backend(base.device)  # it tries its kernels, which needs numbers
        if hollow.format is not None:
            pack, packed = packer(hollow.format), {}
            for site in choose_sites(base.model, hollow.in_float32)[0]:
                shape = site.out_in
                if shape not in packed:
                    generator = torch.Generator().manual_seed(0)
                    packed[shape] = pack(site.name, torch.randn(shape, generator=generator))
                modules.append((site.name, site.module))
                made = pack_module(site.module, packed[shape], base.dtype)
                put_module(base.model, site.name, made)
        fakes: dict[int, nn.Parameter] = {}
        for module in base.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is None:
                    continue
                held.append((module, name, parameter))
                if id(parameter) not in fakes:
                    fakes[id(parameter)] = nn.Parameter(trace.fake_of(parameter, "weights"), requires_grad=False)
        for module, name, parameter in held:
            module._parameters[name] = fakes[id(parameter)]
        base.sites = find_sites(base.model, base.head)
        yield base
    finally:
        base._fingerprint = known
        for module, name, parameter in held:
            module._parameters[name] = parameter
        for name, module in modules:
            put_module(base.model, name, module)
        base.sites = find_sites(base.model, base.head)
