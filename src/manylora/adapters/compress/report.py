"""What compressing cost, as one value that is printed, saved and compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from manylora.adapters.compress.reduce import Recipe, Reduced, SiteLoss
from manylora.adapters.merge.report import Difference


@dataclass(frozen=True, slots=True)
class Trial:
    """Another recipe that was measured, the bytes and the mean KL that it gives."""

    recipe: Recipe
    num_bytes: int
    kl: float


@dataclass(frozen=True, slots=True)
class CompressReport:
    """The measured cost of a smaller adapter.

    Bytes are those of tensors: `bytes_before` of the adapter as it came, `bytes_bf16` of the same numbers in 16 bits.
    `logits`: against the adapter as it came, on probe rows. `base_logits`: the bare base against it, which is what was
    learned. None: no base was given.
    """

    recipe: Recipe
    bits: float
    num_parameters_before: int
    num_parameters: int
    bytes_before: int
    bytes_bf16: int
    bytes_after: int
    copies_bytes: int
    error: float | None
    sites: tuple[SiteLoss, ...]
    logits: Difference | None = None
    base_logits: Difference | None = None
    num_rows: int = 0
    num_positions: int = 0
    compute_dtype: str | None = None
    max_kl: float | None = None
    others: tuple[Trial, ...] = ()
    folder: Path | None = None

    @property
    def kl(self) -> float | None:
        """Mean KL(as it came || compressed) in nats."""
        return None if self.logits is None else self.logits.kl

    @property
    def passed(self) -> bool:
        """Whether what is lost is within the bound."""
        return self.max_kl is None or (self.kl is not None and self.kl <= self.max_kl)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        own = asdict(self.recipe)
        own["rho"] = self.recipe.rho if self.recipe.scheme == "split" else None
        return {
            **own, "passed": self.passed, "max_kl": self.max_kl, "bits": self.bits,
            "num_parameters_before": self.num_parameters_before, "num_parameters": self.num_parameters,
            "bytes_before": self.bytes_before, "bytes_bf16": self.bytes_bf16, "bytes_after": self.bytes_after,
            "copies_bytes": self.copies_bytes, "error": self.error, "kl": self.kl,
            "logits": None if self.logits is None else asdict(self.logits),
            "base_logits": None if self.base_logits is None else asdict(self.base_logits),
            "num_rows": self.num_rows, "num_positions": self.num_positions, "compute_dtype": self.compute_dtype,
            "sites": [asdict(site) for site in self.sites],
            "others": [
                {"asked": in_words(one.recipe), "bytes_after": one.num_bytes, "kl": one.kl} for one in self.others
            ],
            "folder": None if self.folder is None else str(self.folder),
        }  # fmt: skip


def report_of(made: Reduced, num_parameters_before: int, bytes_before: int) -> CompressReport:
    """A report before anything was measured on a base."""
    copies = sum(own.num_parameters() for own in made.adapter.factors.values()) - made.num_parameters
    return CompressReport(
        made.recipe, made.bits, num_parameters_before, made.num_parameters, bytes_before,
        2 * (num_parameters_before + copies), made.num_bytes, made.copies_bytes, made.error, made.sites,
    )  # fmt: skip


def in_words(recipe: Recipe) -> str:
    """A recipe as it is asked for on the command line."""
    bits = {"int8": "--bits 8", "int4": "--bits 4", "split": f"--bits 2 --rho {recipe.rho:g}", None: ""}[recipe.scheme]
    cut = f"--rank {recipe.rank}" if recipe.rank is not None else ""
    cut = f"--energy {recipe.energy:g}" if recipe.energy is not None else cut
    return " ".join(part for part in (cut, bits) if part)


def facts(report: CompressReport) -> Mapping[str, str]:
    """The lines above the table of sites."""
    stored = report.recipe.scheme or "float32"
    lines = {"stored as": f"{stored}, {report.bits:.3g} bits for each number, scales counted"}
    share = report.bytes_after / report.bytes_before
    lines["bytes"] = f"{report.bytes_before:,} -> {report.bytes_after:,} ({share:.1%}; in bf16: {report.bytes_bf16:,})"
    if report.copies_bytes:
        lines["of these"] = f"{report.copies_bytes:,} are whole copies of sites, which stay as they are"
    if report.num_parameters != report.num_parameters_before:
        ranks = [site.rank for site in report.sites]
        found = f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
        lines["rank"] = f"{found}; {report.num_parameters_before:,} numbers -> {report.num_parameters:,}"
    if report.error is not None:
        lines["delta"] = f"relative error {report.error:.3g} over all sites"
    if report.logits is None:
        lines["logits"] = "not measured"
        return lines
    found_logits, bare = report.logits, report.base_logits
    learned = "" if bare is None else f" (bare base: {bare.kl:.3g}, max {bare.max_kl:.3g})"
    lines["KL"] = f"mean {found_logits.kl:.3g}, max {found_logits.max_kl:.3g} nats{learned}"
    lines["top-1"] = f"{found_logits.top1:.2%} agree" + ("" if bare is None else f" (bare base: {bare.top1:.2%})")
    lines["measured on"] = f"{report.num_rows} rows, {report.num_positions} positions, in {report.compute_dtype}"
    return lines
