"""The error of a merge: of each site's weight against W + delta, and of the logits against the unmerged model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.merge.probes import Probes
from manylora.adapters.merge.report import Difference, SiteError
from manylora.adapters.merge.storage import Storage
from manylora.adapters.merge.weights import Weights
from manylora.base.frozen import FrozenModel
from manylora.base.language import LanguageBase
from manylora.forwards import Level, run_with
from manylora.forwards import standing_in as stand_in_for
from manylora.types import Batch, Site

Parameters = Callable[[Site], Mapping[str, Tensor]]
"""What stands in for a site's own parameters; empty: nothing does."""


def site_error(weights: Weights, site: Site, storage: Storage) -> SiteError:
    """How far a site's stored weight is from W + delta, and how much of delta is in it.

    Semantics: error = |stored - (W + delta)| / |delta|; survives = <stored - stored(W), delta> / |delta|^2, over all
    parameters of the site.
    """
    changes = weights.change(site)
    parameters = {name: weights.before(site, name) for name in changes}
    stored = weights.stored(site, storage, parameters, changes)
    alone = weights.stored(site, storage, parameters, {})
    squares = {"error": 0.0, "change": 0.0, "weight": 0.0, "along": 0.0}
    for name, change in changes.items():
        change, before = change.double(), parameters[name].double()
        kept = stored[name].double()
        squares["error"] += float((kept - before - change).square().sum())
        squares["change"] += float(change.square().sum())
        squares["weight"] += float(before.square().sum())
        squares["along"] += float(((kept - alone[name].double()) * change).sum())
    size = squares["change"]
    return SiteError(
        site=site.name,
        method=weights.adapter.factors[weights.factor_site(site.name) or ""].method,
        error=(squares["error"] / size) ** 0.5 if size else None,
        survives=squares["along"] / size if size else None,
        size=(size / squares["weight"]) ** 0.5 if squares["weight"] else None,
    )


@torch.no_grad()
def unmerged_logits(base: FrozenModel, adapter: Adapter, probes: Probes) -> tuple[Tensor, Tensor]:
    """Logits (positions, V) of base + adapter by the bank, and of the bare base; float32 or wider, on the CPU."""
    with Bank(base) as bank:
        bank.put(adapter, slot=0)
        found = []
        for slot in (0, -1):
            with bank.route((slot,) * probes.num_rows):
                found.append(probe_logits(base, probes))
    return found[0], found[1]


@torch.no_grad()
def logits_with(base: FrozenModel, parameters: Parameters, probes: Probes) -> Tensor:
    """Logits (positions, V) of the base's own code with other parameters at its sites."""
    with standing_in(base, parameters):
        return probe_logits(base, probes)


@torch.no_grad()
def probe_logits(base: FrozenModel, probes: Probes) -> Tensor:
    """Logits (positions, V) as the base computes them now, float32 or wider, on the CPU."""
    batch = Batch(inputs=probes.inputs, targets={}, slots=(0,) * probes.num_rows).to(base.device)
    outputs: Any = base.outputs(batch)
    logits: Tensor = base.logits(outputs.hidden) if isinstance(base, LanguageBase) else outputs.logits
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits.cpu()
    return logits.reshape(-1, logits.shape[-1]) if probes.counted is None else logits[probes.counted]


def difference(truth: Tensor, other: Tensor) -> Difference:
    """How far logits are from the unmerged model's; KL(unmerged || other) in nats."""
    apart = (truth.double() - other.double()).abs()
    kls: list[Tensor] = []
    for one, two in zip(truth.split(256), other.split(256), strict=True):
        logs = functional.log_softmax(one.double(), -1)
        # Rounding may take a sum of positive and negative terms a little below its true value, zero or more.
        kls.append((logs.exp() * (logs - functional.log_softmax(two.double(), -1))).sum(-1).clamp_min(0.0))
    kl = torch.cat(kls)
    return Difference(
        max_abs=float(apart.max()),
        mean_abs=float(apart.mean()),
        kl=float(kl.mean()),
        max_kl=float(kl.max()),
        top1=float((truth.argmax(-1) == other.argmax(-1)).double().mean()),
    )


@contextmanager
def standing_in(base: FrozenModel, parameters: Parameters) -> Iterator[None]:
    """Within it every site computes with the parameters that are given for it; the base's own are not touched."""
    with ExitStack() as stack:
        for site in base.sites.values():
            stack.enter_context(stand_in_for(site.module, _OtherParameters(site, parameters), Level.SITE))
        yield


class _OtherParameters:
    """A site's own code with other parameters, which are dropped again after the call."""

    def __init__(self, site: Site, parameters: Parameters):
        self.site = site
        self.parameters = parameters

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        site = self.site
        module: Any = site.module
        given = self.parameters(site)
        if not given:
            return site.map(*args, **kwargs)
        if site.packed is not None:
            bias = given.get("bias")
            x = args[0] if args else next(iter(kwargs.values()))
            dense = site.kind.as_map(given["weight"])
            return module.product(x, dense.to(x.device, x.dtype), None if bias is None else bias.to(x.device, x.dtype))
        own = dict(module.named_parameters(recurse=False))
        moved = {name: value.to(own[name].device, own[name].dtype) for name, value in given.items()}
        made: Tensor = run_with(module, moved, *args, **kwargs)
        return made
