"""Fresh adapters whatever their init wants to know: one that reads data is given drawn inputs."""

from __future__ import annotations

from typing import Any

import torch

from manylora.adapters.adapter import Adapter
from manylora.base.frozen import FrozenModel
from manylora.methods.inits import INITS
from manylora.spec import AdapterSpec


def drawn_inputs(base: FrozenModel, spec: AdapterSpec, *, seed: int = 0) -> dict[str, Any] | None:
    """What an init that reads data finds of inputs that vary in some places more than in others; None: it has none."""
    reader = INITS.get(spec.init).reads
    if reader is None:
        return None
    found = {}
    for place, (name, rank) in enumerate(Adapter.check(base, spec).items()):
        if rank:
            site = base.sites[name]
            generator = torch.Generator().manual_seed(1000 * seed + place)
            width = site.out_in[1]
            statistic = reader.begin(site, rank)
            spread = (1 + torch.arange(width)).pow(-0.2 - 0.6 * torch.rand((), generator=generator))
            statistic.add(torch.randn(4 * width, width, generator=generator) * spread)
            found[name] = statistic.result()
    return found


def new_adapter(base: FrozenModel, spec: AdapterSpec, *, seed: int = 0) -> Adapter:
    """`Adapter.new`, with drawn inputs where its init reads data."""
    return Adapter.new(base, spec, seed=seed, inputs=drawn_inputs(base, spec))
