"""One adapter out of several: their deltas are combined, site by site, and factored again."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from manylora.adapters.adapter import Adapter
from manylora.adapters.combine.change import Change, Combining, Dense, LowRank, Options, truncated
from manylora.adapters.combine.ways import COMBININGS
from manylora.adapters.receipt import check_receipt
from manylora.errors import AdapterBroken, BaseMismatch, SpecError
from manylora.methods import METHODS, WHOLE_COPY
from manylora.spec import AdapterSpec
from manylora.types import Factors

if TYPE_CHECKING:
    from manylora.base.frozen import FrozenModel

DENSITY = 0.2
"""The share of entries that trimming keeps: TIES' own default, k = 20 %."""


@dataclass(frozen=True, slots=True)
class SiteLoss:
    """A site of the combined adapter: its rank (None: a whole copy), and |lost| / |combined delta| by the rank."""

    site: str
    rank: int | None
    lost: float


@dataclass(frozen=True, slots=True)
class Combined:
    """The combined adapter, and what each site's rank loses of the combined delta."""

    adapter: Adapter
    sites: tuple[SiteLoss, ...]


def combine(
    adapters: Sequence[Adapter],
    method: str = "linear",
    *,
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    density: float | None = None,
    seed: int | None = None,
    base: FrozenModel | None = None,
) -> Combined:
    """One adapter whose delta combines those of several; a site that one of them lacks is zero there.

    `weights` (default: equal, summing to 1), one for each adapter. `rank` of the result (default: the largest among
    the adapters at the site; `linear` keeps the sum of all ranks and loses nothing). `density` (default 0.2): the share
    of entries that ties, dare and magnitude keep. `base` is needed where an adapter holds whole copies.

    Raises:
        BaseMismatch: the adapters were made for different bases or tokenizers. SpecError: an option that the method
        does not read, or one out of range. AdapterBroken: shapes that differ.
    """
    way = COMBININGS.get(method)
    given = {"rank": rank, "density": density, "seed": seed}
    _check_options(way, {name: value for name, value in given.items() if value is not None})
    if len(adapters) < 2:
        raise SpecError(f"{len(adapters)} adapters to combine", allowed="at least 2")
    shares = [1 / len(adapters)] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(adapters) or not all(map(math.isfinite, shares)) or not any(shares):
        raise SpecError(
            f"weights are {', '.join(f'{share:g}' for share in shares)} for {len(adapters)} adapters",
            allowed="one finite number for each adapter, not all zero",
        )
    plain = [adapter.plain() for adapter in adapters]
    _check_same_base(plain, base)
    tied = _tied(plain)
    names = list(dict.fromkeys(name for adapter in plain for name in adapter.factors))
    kinds = _kinds(plain)
    factors: dict[str, Factors] = {}
    losses = []
    for name in names:
        made, loss = _site(name, plain, shares, way, rank, density or DENSITY, seed or 0, kinds.get(name), base)
        factors[name] = made
        losses.append(loss)
    return Combined(_adapter(factors, plain, kinds, tied), tuple(losses))


def needs_base(adapters: Sequence[Adapter]) -> bool:
    """Whether some change is only known beside the base."""
    return not all(METHODS.get(own.method).low_rank for adapter in adapters for own in adapter.factors.values())


def _check_options(way: Combining, given: Mapping[str, float | int]) -> None:
    for name, value in given.items():
        if name not in way.takes:
            allowed = ", ".join(sorted(way.takes)) or "no options but weights"
            raise SpecError(f"{name} is given, and {way.name!r} does not read it", allowed=allowed)
        if name == "rank" and value < 1:
            raise SpecError(f"rank is {value}", allowed="at least 1")
        if name == "density" and not 0 < value <= 1:
            raise SpecError(f"density is {value}", allowed="above 0, at most 1", next_step=f"try {DENSITY}")


def _check_same_base(adapters: Sequence[Adapter], base: FrozenModel | None) -> None:
    if base is not None:
        for adapter in adapters:
            check_receipt(adapter, base)
        return
    first = adapters[0]
    for place, other in enumerate(adapters[1:], 2):
        pairs: dict[str, tuple[Any, Any]] = {
            "base": (first.base_fingerprint, other.base_fingerprint),
            "tokenizer": (first.receipt.get("tokenizer"), other.receipt.get("tokenizer")),
            "chat template": (first.receipt.get("chat_template"), other.receipt.get("chat_template")),
        }
        if None in pairs["base"]:
            pairs["base"] = (first.base_name, other.base_name)  # PEFT writes no fingerprint
        for what, (one, two) in pairs.items():
            if one is not None and two is not None and one != two:
                raise BaseMismatch(
                    f"adapter {place} was made for another {what} ({str(two)[:40]}) than the first ({str(one)[:40]})",
                    allowed="adapters of one base",
                    next_step="name the base to compare both with it: --base B" if what == "base" else None,
                )


def _tied(adapters: Sequence[Adapter]) -> dict[str, str]:
    """Names that share another site's copy; all adapters that copy the two must agree that they share it."""
    tied = {name: owner for adapter in adapters for name, owner in adapter.tied.items()}
    for name, owner in tied.items():
        for adapter in adapters:
            if name in adapter.factors or (owner in adapter.factors and adapter.tied.get(name) != owner):
                raise BaseMismatch(
                    f"{name!r} and {owner!r} share one copy in one adapter and not in another",
                    next_step="these adapters cannot be one: merge them apart",
                )
    return tied


def _kinds(adapters: Sequence[Adapter]) -> dict[str, str]:
    return {name: kind for adapter in adapters for name, kind in adapter.kinds.items()}


def _site(
    name: str, adapters: Sequence[Adapter], shares: Sequence[float], way: Combining, rank: int | None, density: float,
    seed: int, kind: str | None, base: FrozenModel | None,
) -> tuple[Factors, SiteLoss]:  # fmt: skip
    """The combined factors of one site."""
    members = [place for place, adapter in enumerate(adapters) if name in adapter.factors]
    held = [adapters[place].factors[name] for place in members]
    weights = [shares[place] for place in members]
    if not all(METHODS.get(own.method).low_rank for own in held):
        return _full_site(name, adapters, members, weights, way, density, seed, base)
    changes: list[Change] = []
    for place, own in zip(members, held, strict=True):
        a, b = (factor.float() for factor in METHODS.get(own.method).product(own))
        changes.append(LowRank(a, adapters[place].spec.scale(name) * b))
    sides = [(change.b.shape[0], change.a.shape[1]) for change in changes if isinstance(change, LowRank)]
    _check_shapes(name, sides)
    combined = way(changes, weights, members, Options(density, seed, f"{name}.weight"))
    most = min(sides[0])
    if way.exact and isinstance(combined, LowRank) and combined.a.shape[0] <= most:
        low, lost = combined, 0.0
    else:
        wanted = most if way.exact else rank or max(METHODS.get(own.method).rank(own) for own in held)
        low, lost = truncated(combined, min(wanted, most))
    method = METHODS.get(held[0].method)
    return method.of_product(low.a, low.b, like=held[0]), SiteLoss(name, low.a.shape[0], lost)


def _check_shapes(name: str, shapes: Sequence[tuple[int, ...]]) -> None:
    if len(set(shapes)) > 1:
        raise AdapterBroken(
            f"{name!r} is {' x '.join(map(str, shapes[0]))} in one adapter and "
            f"{' x '.join(map(str, next(shape for shape in shapes if shape != shapes[0])))} in another",
            next_step="they belong to bases of other sizes",
        )


def _full_site(
    name: str, adapters: Sequence[Adapter], members: Sequence[int], weights: Sequence[float], way: Combining,
    density: float, seed: int, base: FrozenModel | None,
) -> tuple[Factors, SiteLoss]:  # fmt: skip
    """The combined whole copy of one site: the base's parameters and the combined change of each."""
    if base is None:
        raise BaseMismatch(
            f"an adapter holds {name!r} by a method whose change is only known beside the base (a whole copy, dora)",
            next_step="give the base: --base B",
        )
    site = base.sites.get(name)
    if site is None:
        raise BaseMismatch(f"the adapters' site {name!r} is not in this base")
    own = {key: value.float().cpu() for key, value in site.parameters().items()}
    by_key: dict[str, list[tuple[int, float, Tensor]]] = {}
    for place, weight in zip(members, weights, strict=True):
        held = adapters[place].factors[name]
        for key, value in METHODS.get(held.method).delta(site, held, adapters[place].spec).items():
            _check_shapes(f"{name}.{key}", [tuple(own[key].shape), tuple(value.shape)])
            by_key.setdefault(key, []).append((place, weight, value))
    copies = dict(own)
    for key, entries in by_key.items():
        options = Options(density, seed, f"{name}.{key}")
        change = way([Dense(v) for _, _, v in entries], [w for _, w, _ in entries], [p for p, _, _ in entries], options)
        copies[key] = own[key] + change.dense()
    return Factors(WHOLE_COPY, copies), SiteLoss(name, None, 0.0)


def _adapter(
    factors: Mapping[str, Factors], adapters: Sequence[Adapter], kinds: Mapping[str, str], tied: Mapping[str, str]
) -> Adapter:
    """The factors as an ordinary adapter: scale 1 everywhere, the commonest rank as its own."""
    ranks = {name: rank for name, own in factors.items() if (rank := METHODS.get(own.method).rank(own))}
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    odd = {re.escape(name): rank for name, rank in ranks.items() if rank != common}
    full = [name for name in factors if name not in ranks]
    methods = {factors[name].method for name in ranks} or {WHOLE_COPY}
    spec = AdapterSpec(
        method=methods.pop(), rank=common, alpha=float(common), sites=tuple(ranks),
        full_sites=(*full, *tied), rank_pattern=odd, alpha_pattern={key: float(rank) for key, rank in odd.items()},
    )  # fmt: skip
    first = adapters[0]
    known = next((adapter for adapter in adapters if adapter.base_fingerprint is not None), first)
    receipt: dict[str, Any] = {}
    for adapter in adapters:
        for key in ("tokenizer", "chat_template"):
            if adapter.receipt.get(key) is not None:
                receipt.setdefault(key, adapter.receipt[key])
        if "frozen" in adapter.receipt:
            receipt["frozen"] = receipt.get("frozen", {}) | dict(adapter.receipt["frozen"])
    return Adapter(
        spec, dict(factors), known.base_name, known.base_fingerprint, receipt=receipt,
        kinds={name: kind for name, kind in kinds.items() if name in ranks}, tied=tied,
        task_type=next((adapter.task_type for adapter in adapters if adapter.task_type), None),
    )  # fmt: skip
