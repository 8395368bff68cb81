"""Merging: a pure function of base and adapter, measured before anything is called done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from manylora.adapters.bank import Bank
from manylora.adapters.merge.folder import write_model, write_report
from manylora.adapters.merge.measure import difference, logits_with, site_error, unmerged_logits
from manylora.adapters.merge.opening import prove_opens
from manylora.adapters.merge.probes import Probes, make_probes
from manylora.adapters.merge.report import (
    DEFAULT_BOUND,
    Difference,
    Losses,
    MergeReport,
    over_bound,
    shares_lost,
    worst_first,
)
from manylora.adapters.merge.source import MemorySource, source_of
from manylora.adapters.merge.storage import Storage, storage_of
from manylora.adapters.merge.weights import Weights
from manylora.adapters.receipt import check_receipt
from manylora.errors import ConfigError, MergeRefused, SpecError, nearest_names
from manylora.files import refuse_occupied, write_folder_atomic
from manylora.gathering import gathered
from manylora.quant import PACKINGS
from manylora.types import Site

if TYPE_CHECKING:
    from manylora.adapters.adapter import Adapter
    from manylora.base.frozen import FrozenModel

ONTO = ("original", "dequantised")
ALLOWED_ONTO = "original, dequantised, dequantised:FORMAT"
ALWAYS_MEASURED = ("bf16", "fp32")
"""What is measured too where a storage loses too much, so that the refusal can say what would do."""


def merge(
    base: FrozenModel,
    adapter: Adapter,
    into: str = "bf16",
    *,
    onto: str | None = None,
    output: str | Path | None = None,
    max_error: float | None = None,
    probes: Sequence[Sequence[int]] | None = None,
) -> MergeReport:
    """The measured error of base and adapter as one model, and with `output` that model's folder.

    `into`: fp32, bf16, fp16, or a packing. `onto`: "original" weights, "dequantised" (what the base's packed weights
    stand for) or "dequantised:nf4"; None: dequantised where the base is packed. `max_error` bounds two shares of what
    was learned (default 0.5): the change that is lost at the median site, and how far the answers are from the
    unmerged model's, the bare base's being 1; where no logits can be had, the median site's error over its delta.
    `probes` are further rows of tokens to measure on. The base is not touched.

    Raises:
        MergeRefused: more than `max_error` would be lost; nothing is written, and `error.report` has the numbers.
        OutputExists: the folder already holds something. BaseMismatch: the adapter was made for another base.
    """
    bound = DEFAULT_BOUND if max_error is None else max_error
    if not bound > 0:
        raise SpecError(f"max_error is {bound!r}", allowed="a number above 0", next_step=f"try {DEFAULT_BOUND}")
    storage = storage_of(into)
    if output is not None:
        refuse_occupied(Path(output))
    check_receipt(adapter, base)
    with Bank(base) as bank:
        bank.put(adapter, slot=0)  # a site or a shape that this base has not is an error here
    weights, onto_name = _weights(base, adapter, onto)
    rows = make_probes(base, probes)
    report, merged_logits = _measured(weights, onto_name, storage, rows, bound)
    if not report.passed:
        raise MergeRefused(
            f"merging into {report.into} loses too much: {'; '.join(report.reasons)}",
            allowed=f"at most {bound:g} of what was learned, where 1 is all of it",
            next_step=_next_step(report),
            report=report,
        )
    if output is None:
        return report
    report = replace(report, folder=Path(output))
    with write_folder_atomic(output) as new:
        write_model(new, weights, storage)
        report = replace(report, notes=(*report.notes, prove_opens(new, base, rows, merged_logits)))
        write_report(new, weights, report)
    return report


def _weights(base: FrozenModel, adapter: Adapter, onto: str | None) -> tuple[Weights, str]:
    """The weights to merge onto, and their name in words.

    Raises:
        ConfigError: a name that is none; dequantised weights of a base that is not packed, or original ones of a base
            whose folder has none.
    """
    packed = {site.packed.format for site in base.sites.values() if site.packed is not None}
    asked, _, wanted = (onto or ("dequantised" if packed else "original")).partition(":")
    source = source_of(base, [*adapter.factors, *adapter.tied])
    if asked not in ONTO or (wanted and asked != "dequantised"):
        raise ConfigError(f"onto is {onto!r}", nearest=nearest_names(asked, ONTO), allowed=ALLOWED_ONTO)
    if asked == "original":
        if packed and isinstance(source, MemorySource):
            raise ConfigError(
                f"the original weights are not there: {source.note}", allowed="--onto dequantised",
                next_step="give the folder that was packed as the base, or merge onto the dequantised weights",
            )  # fmt: skip
        return Weights(base, adapter, source), asked
    if not packed and not wanted:
        raise ConfigError(
            "onto is 'dequantised', and this base is not packed", allowed=ALLOWED_ONTO,
            next_step="say which packing the adapter was trained on: dequantised:nf4",
        )  # fmt: skip
    if packed and wanted and {wanted} != packed:
        raise ConfigError(f"onto is {onto!r}, and this base is packed as {', '.join(sorted(packed))}")
    if packed:
        return Weights(base, adapter, source, _own_dense), f"dequantised:{', '.join(sorted(packed))}"
    packing = PACKINGS.get(wanted)
    return Weights(base, adapter, source, lambda site, weight: packing.pack(weight).dense(weight.dtype)), f"{onto}"


def _own_dense(site: Site, weight: Tensor) -> Tensor:
    """What the packed weight in the base stands for."""
    assert site.packed is not None
    with gathered(site.module):
        return site.packed.dense(weight.dtype).cpu()


def _measured(
    weights: Weights, onto: str, storage: Storage, probes: Probes | None, bound: float
) -> tuple[MergeReport, Tensor | None]:
    """The report of one storage, with others beside it where this one is over the bound; and its logits."""
    truth = bare = None
    bare_difference: Difference | None = None
    if probes is not None:
        truth, bare = _truth(weights, probes)
        bare_difference = difference(truth, bare)
    losses, merged = _losses(weights, storage, probes, truth)
    notes = [] if weights.source.note is None else [weights.source.note]
    if probes is None:
        notes.append("logits were not compared: this base has no example inputs")
    if losses.median_error is None:
        notes.append("the adapter changes nothing: its delta is zero at every site")
    reasons = over_bound(losses, bare_difference, bound, None)
    others: tuple[Losses, ...] = ()
    if reasons:
        names = [name for name in ALWAYS_MEASURED if name != storage.name]
        others = tuple(_losses(weights, storage_of(name), probes, truth)[0] for name in names)
        exact = next((other.logits for other in (losses, *others) if other.into == "fp32"), None)
        reasons = over_bound(losses, bare_difference, bound, exact)
        if not reasons:
            notes.append(f"the KL of the merged model is the noise of computing in {weights.base.dtype}, not its error")
    report = MergeReport(
        losses=losses, onto=onto, base=weights.base.name, num_rows=probes.num_rows if probes else 0,
        num_positions=0 if truth is None else len(truth), bound=bound, base_logits=bare_difference,
        compute_dtype=str(weights.base.dtype).removeprefix("torch."), untied=weights.untied, notes=tuple(notes),
        others=others, reasons=reasons,
    )  # fmt: skip
    return report, merged


def _truth(weights: Weights, probes: Probes) -> tuple[Tensor, Tensor]:
    """Logits of the model that the adapter was trained as, unmerged, and of its base alone."""
    base = weights.base
    if weights.onto is None or any(site.packed is not None for site in base.sites.values()):
        return unmerged_logits(base, weights.adapter, probes)
    # The base that the adapter was trained on is the packed form of this one, and only exists as it is computed.
    exact = storage_of("fp32")
    with_adapter, alone = (
        logits_with(base, partial(weights.kept, storage=exact, with_change=change), probes) for change in (True, False)
    )
    return with_adapter, alone


def _losses(
    weights: Weights, storage: Storage, probes: Probes | None, truth: Tensor | None
) -> tuple[Losses, Tensor | None]:
    sites = worst_first([site_error(weights, site, storage) for site in weights.changed()])
    logits = found = None
    if probes is not None and truth is not None:
        found = logits_with(
            weights.base,
            lambda site: {} if weights.keeps_all(site, storage) else weights.kept(site, storage),
            probes,
        )
        logits = difference(truth, found)
    return Losses(storage.name, sites, logits), found


def _next_step(report: MergeReport) -> str:
    """Which storages pass, and what to type to take this one all the same."""
    passing = [other.into for other in report.others if not over_bound(other, report.base_logits, report.bound, None)]
    needed = max(shares_lost(report.losses, report.base_logits).values())
    accept = f"to accept the loss: --max-error {_rounded_up(needed):g}"
    return f"{' and '.join(passing)} would pass; {accept}" if passing else accept


def _rounded_up(value: float) -> float:
    """The next number of two digits."""
    if not 0 < value < math.inf:
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return float(f"{math.ceil(value / unit * (1 + 1e-9)) * unit:.2g}")
