"""Compressing: a smaller adapter, measured against the one that came before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.adapters.bank import Bank
from manylora.adapters.compress.file import COMPRESSED_FILE
from manylora.adapters.compress.folder import write_folder
from manylora.adapters.compress.reduce import Recipe, Reduced, reduced
from manylora.adapters.compress.report import CompressReport, Trial, in_words, report_of
from manylora.adapters.compress.schemes import SCHEME_OF_BITS
from manylora.adapters.compress.split import RHO
from manylora.adapters.merge.measure import difference, probe_logits
from manylora.adapters.merge.probes import Probes, make_probes
from manylora.adapters.peft.config import TENSORS_FILE
from manylora.adapters.receipt import check_receipt
from manylora.errors import CompressRefused, ConfigError, nearest_names
from manylora.files import refuse_occupied
from manylora.methods import METHODS

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel


def compress(
    adapter: Adapter | str | Path,
    *,
    bits: int | None = None,
    rank: int | None = None,
    energy: float | None = None,
    rho: float = RHO,
    base: FrozenModel | None = None,
    max_kl: float | None = None,
    probes: Sequence[Sequence[int]] | None = None,
    output: str | Path | None = None,
) -> CompressReport:
    """The measured cost of a smaller adapter, and with `output` its folder.

    `bits`: 8 (int8), 4 (int4) or 2 (split: two bits for the components that hold `rho` of the product, one for the
    rest); None: 8, or float32 where `rank` or `energy` cuts components. `max_kl`: the most mean KL, in nats, from the
    adapter as it came. Logits are compared where a `base` is given, on rows of its vocabulary and on `probes`.

    Raises:
        CompressRefused: the KL is above `max_kl`; nothing is written, and `error.report` has the numbers.
        ConfigError: a value out of range. OutputExists: the folder already holds something.
        BaseMismatch: the adapter was made for another base. AdapterBroken: there are no factors to compress.
    """
    recipe = Recipe(scheme=_scheme(bits, rank is not None or energy is not None), rank=rank, energy=energy, rho=rho)
    if max_kl is not None and not max_kl >= 0:
        raise ConfigError(f"max_kl is {max_kl!r}", allowed="0 or more, in nats", next_step="try 1e-3")
    if max_kl is not None and base is None:
        raise ConfigError("max_kl is given and no base to measure it on", next_step="give the base")
    if output is not None:
        refuse_occupied(Path(output))
    source = None if isinstance(adapter, Adapter) else Path(adapter)
    original = adapter if isinstance(adapter, Adapter) else Adapter.load(adapter)
    made = reduced(original, recipe)
    before = sum(own.num_parameters() for own in original.plain().factors.values() if METHODS.get(own.method).low_rank)
    report = replace(report_of(made, before, _bytes_of(original, source)), max_kl=max_kl)
    if base is not None:
        report = _measured(report, base, original, made, probes)
    if not report.passed:
        raise _refusal(report)
    if output is None:
        return report
    report = replace(report, folder=Path(output))
    write_folder(made, Path(output), report.to_dict(), base=base, source=source)
    return report


def _scheme(bits: int | None, cuts: bool) -> str | None:
    if bits is None:
        return None if cuts else SCHEME_OF_BITS[8]
    if bits not in SCHEME_OF_BITS:
        known = ", ".join(map(str, SCHEME_OF_BITS))
        raise ConfigError(f"bits is {bits}", nearest=nearest_names(str(bits), map(str, SCHEME_OF_BITS)), allowed=known)
    return SCHEME_OF_BITS[bits]


def _bytes_of(adapter: Adapter, source: Path | None) -> int:
    """Bytes of the adapter's tensors: of its file, or as it would be written."""
    if source is None:
        return sum(value.nbytes for own in adapter.plain().factors.values() for value in own.tensors.values())
    path = source / TENSORS_FILE
    path = path if path.is_file() else source / COMPRESSED_FILE
    with path.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    return path.stat().st_size - 8 - header


def _measured(
    report: CompressReport, base: FrozenModel, original: Adapter, made: Reduced, rows: Sequence[Sequence[int]] | None
) -> CompressReport:
    """The report with logits; where they are past the bound, with what else would do."""
    check_receipt(original, base)
    probes = make_probes(base, rows)
    if probes is None:
        if report.max_kl is not None:
            raise ConfigError(
                "max_kl is given, and this base has no inputs to measure it on",
                next_step="FrozenModel(module, example=lambda rows: {...})",
            )
        return report
    bare, truth = _logits(base, None, probes), _logits(base, original, probes)
    report = replace(
        report,
        logits=difference(truth, _logits(base, made.adapter, probes)),
        base_logits=difference(truth, bare),
        num_rows=probes.num_rows,
        num_positions=len(truth),
        compute_dtype=str(base.dtype).removeprefix("torch."),
    )
    if report.passed:
        return report
    others: dict[tuple[int, float], Trial] = {}
    for recipe in sorted(_milder(report.recipe), key=lambda recipe: len(in_words(recipe))):
        other = reduced(original, recipe)
        kl = difference(truth, _logits(base, other.adapter, probes)).kl
        others.setdefault((other.num_bytes, kl), Trial(recipe, other.num_bytes, kl))  # a share may cut nothing
    return replace(report, others=tuple(others[key] for key in sorted(others)))


@torch.no_grad()
def _logits(base: FrozenModel, adapter: Adapter | None, probes: Probes) -> Tensor:
    """Logits (positions, V) of the base with an adapter, or bare."""
    slot = -1 if adapter is None else 0
    with Bank(base) as bank:
        if adapter is not None:
            bank.put(adapter, slot=0)
        with bank.route((slot,) * probes.num_rows):
            return probe_logits(base, probes)


def _milder(recipe: Recipe) -> list[Recipe]:
    """What loses less: more bits, and where components are cut, fewer or none of them."""
    order: list[str | None] = ["split", "int4", "int8"]
    tried = [recipe.scheme] if recipe.scheme is None else list(order[order.index(recipe.scheme) :])
    cuts = [{"rank": recipe.rank, "energy": recipe.energy}]
    if recipe.cuts:
        cuts += [{"energy": share} for share in (0.99, 0.999) if recipe.energy is None or share > recipe.energy] + [{}]
    # A share of the last, where no component is cut, needs a scheme.
    asked = [(scheme, cut) for scheme in tried for cut in cuts if scheme is not None or cut]
    asked += [("int8", {})] if recipe.scheme is None else []
    if recipe.scheme == "split" and not recipe.cuts:
        # Four bits for few components often keep more than one or two bits for all, in as many bytes.
        asked += [("int4", {"energy": 0.9}), ("int4", {"energy": 0.99})]
    rhos = {recipe.rho, 0.95, 1.0} if recipe.scheme == "split" else {recipe.rho}
    found = [
        Recipe(scheme=scheme, rho=rho, **cut)
        for scheme, cut in asked
        for rho in (sorted(rhos) if scheme == "split" else [RHO])
        if rho >= recipe.rho or scheme != "split"
    ]
    return [one for one in found if in_words(one) != in_words(recipe)]


def _refusal(report: CompressReport) -> CompressRefused:
    passing = [one for one in report.others if report.max_kl is not None and one.kl <= report.max_kl]
    words = in_words(report.recipe)
    if passing:
        best = passing[0]
        step = f"{in_words(best.recipe)} passes (KL {best.kl:.2g}, {best.num_bytes:,} bytes)"
    else:
        step = f"nothing that was tried passes: allow more with --max-kl {report.kl or 0.0:.2g}, or keep the adapter"
    return CompressRefused(
        f"{words} loses too much: mean KL {report.kl:.3g} nats on {report.num_positions} positions",
        allowed=f"at most {report.max_kl:g}",
        next_step=step,
        report=report,
    )
