"""What a merge cost: numbers by site and of the logits, as one value that is printed, saved and compared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_BOUND = 0.5
"""How much of what was learned may be lost: the change that is gone at the median site, and the distance of the answers
from the adapted model's, the bare base's being 1. A site's error is no bound where there are logits: noise of packing
four times as large as the change has left 98 % of what was learned, and rounding back to the grid, with an error of 1,
has left 8 % (bench/merge.py --steps 2 --rows 20)."""


@dataclass(frozen=True, slots=True)
class SiteError:
    """`error`: |stored - (W + delta)| / |delta|. `survives`: the share of delta that is in the stored weight.
    `size`: |delta| / |W|. None where delta is zero."""

    site: str
    method: str
    error: float | None
    survives: float | None
    size: float | None


@dataclass(frozen=True, slots=True)
class Difference:
    """Between two sets of logits: absolute, KL in nats by position, the share of equal first choices."""

    max_abs: float
    mean_abs: float
    kl: float
    max_kl: float
    top1: float


@dataclass(frozen=True, slots=True)
class Losses:
    """What one storage costs: its sites, worst first, and its logits against the unmerged model's."""

    into: str
    sites: tuple[SiteError, ...]
    logits: Difference | None

    @property
    def median_error(self) -> float | None:
        """The error of the middle site, relative to its delta; None where no site changes."""
        return _median([site.error for site in self.sites if site.error is not None])

    @property
    def median_survival(self) -> float | None:
        """The share of delta that is kept at the middle site."""
        return _median([site.survives for site in self.sites if site.survives is not None])


@dataclass(frozen=True, slots=True)
class MergeReport:
    """The measured error of a merge.

    `base_logits` is how far the bare base is from the adapted one: what was learned, as logits show it. `distance` is
    how far the merged model's are, as a share of that. `others` are further storages, measured where this one fails.
    """

    losses: Losses
    onto: str
    base: str
    num_rows: int
    num_positions: int
    compute_dtype: str
    bound: float
    base_logits: Difference | None
    untied: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    others: tuple[Losses, ...] = ()
    folder: Path | None = None
    reasons: tuple[str, ...] = field(default=())

    @property
    def into(self) -> str:
        return self.losses.into

    @property
    def sites(self) -> tuple[SiteError, ...]:
        return self.losses.sites

    @property
    def passed(self) -> bool:
        """Whether what is lost is within the bound."""
        return not self.reasons

    @property
    def max_abs_error(self) -> float | None:
        """The largest difference of a logit from the unmerged model's."""
        return None if self.losses.logits is None else self.losses.logits.max_abs

    @property
    def kl(self) -> float | None:
        """Mean KL(unmerged || merged) in nats."""
        return None if self.losses.logits is None else self.losses.logits.kl

    @property
    def top1(self) -> float | None:
        """The share of positions where both models put the same token first."""
        return None if self.losses.logits is None else self.losses.logits.top1

    @property
    def median_error(self) -> float | None:
        return self.losses.median_error

    @property
    def distance(self) -> float | None:
        """How far the merged model's answers are from the adapted one's; 1: as far as the bare base's."""
        return distance(self.losses.logits, self.base_logits)

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON holds it."""
        return {
            "into": self.into, "onto": self.onto, "base": self.base, "passed": self.passed, "bound": self.bound,
            "median_error": self.median_error, "median_survival": self.losses.median_survival,
            "max_abs_error": self.max_abs_error, "kl": self.kl, "distance": self.distance, "top1": self.top1,
            "logits": None if self.losses.logits is None else asdict(self.losses.logits),
            "base_logits": None if self.base_logits is None else asdict(self.base_logits),
            "num_rows": self.num_rows, "num_positions": self.num_positions, "compute_dtype": self.compute_dtype,
            "untied": list(self.untied), "notes": list(self.notes), "reasons": list(self.reasons),
            "sites": [asdict(site) for site in self.sites],
            "others": {
                other.into: {
                    "median_error": other.median_error, "median_survival": other.median_survival,
                    "kl": None if other.logits is None else other.logits.kl,
                    "distance": distance(other.logits, self.base_logits),
                }
                for other in self.others
            },
            "folder": None if self.folder is None else str(self.folder),
        }  # fmt: skip


def kl_share(merged: Difference | None, bare: Difference | None) -> float | None:
    """One KL as a share of another; None where there is none, or nothing was learned."""
    if merged is None or bare is None or bare.kl <= 0.0:
        return None
    return merged.kl / bare.kl


def distance(merged: Difference | None, bare: Difference | None) -> float | None:
    """How far answers are from the adapted model's, as a share of how far the bare base's are.

    The square root of the KLs' ratio: a KL grows with the square of what is missing.
    """
    share = kl_share(merged, bare)
    return None if share is None else share**0.5


def shares_lost(losses: Losses, bare: Difference | None) -> dict[str, float]:
    """What is lost of what was learned, each as a share, by what it is in words."""
    found, apart = {}, distance(losses.logits, bare)
    if losses.median_survival is not None:
        found["of the change is lost at the median site"] = max(0.0, 1.0 - losses.median_survival)
    if apart is not None:
        found["as far are its answers from the adapter's as the bare base's are"] = apart
    elif losses.median_error is not None:
        found["of the change is the error at the median site"] = losses.median_error
    return found


def over_bound(losses: Losses, bare: Difference | None, bound: float, noise: Difference | None) -> tuple[str, ...]:
    """Why a storage loses more than `bound`; () where it does not.

    `noise` is what the same model without any rounding of its weights shows: the compute dtype's own, which is no error
    of the merge.
    """
    drowned = noise is not None and losses.logits is not None and losses.logits.kl <= 2 * noise.kl
    return tuple(
        f"{share:.3g} {words}"
        for words, share in shares_lost(losses, bare).items()
        if share > bound and not (drowned and "answers" in words)
    )


def worst_first(sites: Sequence[SiteError]) -> tuple[SiteError, ...]:
    """The sites by their error, those that do not change at the end."""
    return tuple(sorted(sites, key=lambda site: -1.0 if site.error is None else site.error, reverse=True))


def facts(report: MergeReport) -> Mapping[str, str]:
    """The lines above the table of sites."""
    losses, lines = report.losses, {"merged into": f"{report.into}, onto {report.onto} weights"}
    if losses.median_error is not None:
        lines["median site"] = (
            f"error {losses.median_error:.3g} of delta, {losses.median_survival or 0.0:.1%} of delta survives"
        )
    if losses.logits is not None:
        found, bare = losses.logits, report.base_logits
        lines["logits"] = f"max {found.max_abs:.3g}, mean {found.mean_abs:.3g} from the unmerged model"
        learned = f" (bare base: {bare.kl:.3g}, max {bare.max_kl:.3g})" if bare is not None else ""
        lines["KL"] = f"mean {found.kl:.3g}, max {found.max_kl:.3g} nats{learned}"
        if report.distance is not None:
            lines["answers"] = f"{report.distance:.3g} as far from the unmerged model's as the bare base's are"
        lines["top-1"] = f"{found.top1:.2%} agree" + (f" (bare base: {bare.top1:.2%})" if bare is not None else "")
    lines["measured on"] = f"{report.num_rows} rows, {report.num_positions} positions, in {report.compute_dtype}"
    for other in report.others:
        apart = distance(other.logits, report.base_logits)
        tail = "" if apart is None else f", answers {apart:.3g} as far as the bare base's"
        lines[f"into {other.into}"] = f"median site error {other.median_error or 0.0:.3g} of delta{tail}"
    return lines


def _median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    if not ordered:
        return None
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
