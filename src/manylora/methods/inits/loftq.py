"""LoftQ: the factors start as the best low-rank picture of what packing has lost, so that step 0 is near the original.

The base is shared by all adapters, so it is never packed again for one of them: `loftq` fits factors to the packed
weight as it is. The paper packs anew at each turn; `loftq_pack` does that, at the one place where a base is packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from manylora.errors import SpecError
from manylora.methods.inits.drawn import default
from manylora.methods.inits.init import Init
from manylora.methods.inits.svd import leading_factors
from manylora.ops.dropout import mix, site_key
from manylora.types import Factors, Start

if TYPE_CHECKING:
    from manylora.spec import AdapterSpec
    from manylora.types import Packed


def loftq(start: Start) -> tuple[Tensor, Tensor]:
    """a and b with s b a the best approximation of W - Q of rank R: W the original weight, Q the packed one in use.

    A site of the base that is not packed has lost nothing; it starts as `default` does.

    Source: LoftQ (2310.08659), equation 7, with the scale s divided out: the paper's code leaves it out, and its start
    is then wrong wherever s is not 1.
    """
    if start.site.packed is None:
        return default(start)
    in_use = start.site.weight()
    lost = start.original().to(in_use.device, torch.promote_types(in_use.dtype, torch.float32)) - in_use
    return leading_factors(lost, start.rank, start.scale, start.generator)


LOFTQ = Init(loftq, starts_at_base=False, needs_packed=True)


def loftq_pack(
    weight: Tensor,
    format: str,  # noqa: A002 - the house's word
    rank: int,
    scale: float,
    iterations: int = 5,
    *,
    generator: torch.Generator | None = None,
    **options: Any,
) -> tuple[Packed, Tensor, Tensor, list[float]]:
    """A weight (O, I) packed together with the factors a (R, I) and b (O, R) that start on it, and the errors.

    `errors[0]` is the Frobenius norm of W - Q of plain packing, `errors[t]` that of W - Q - s b a after turn t, so the
    first is what the factors have to beat. The turns do not improve one another at every step; the best is returned.
    `options` are the format's own.

    Raises:
        SpecError: no turn is asked for, or a rank that the weight does not have.

    Source: LoftQ (2310.08659), algorithm 1, with the scale divided out and the best turn kept.
    """
    from manylora.quant import pack

    if iterations < 1:
        raise SpecError(f"{iterations} iterations of loftq", allowed="at least 1", next_step="the paper's code takes 5")
    if not 1 <= rank <= min(weight.shape):
        raise SpecError(f"rank {rank} for a weight of {' x '.join(map(str, weight.shape))}",
                        allowed=f"1 to {min(weight.shape)}")  # fmt: skip
    draws = generator or torch.Generator().manual_seed(0)
    exact = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    best: tuple[Packed, Tensor, Tensor] | None = None
    lowest = float("inf")
    errors: list[float] = []
    carried = torch.zeros_like(exact)
    for _ in range(iterations):
        packed = pack(exact - carried, format, **options)
        lost = exact - packed.dense(exact.dtype)
        if not errors:
            errors.append(lost.norm().item())
        a, b = leading_factors(lost, rank, scale, draws)
        carried = scale * (b @ a)
        errors.append((lost - carried).norm().item())
        if errors[-1] < lowest:
            best, lowest = (packed, a, b), errors[-1]
    if best is None:
        raise SpecError(
            "the weight holds numbers that are not finite", next_step="mend the weights before packing them"
        )
    return *best, errors


class LoftqPacking:
    """Packs the weights of a base one by one and keeps the factors that start on them, by site.

    Called as (site name, weight (O, I)), which is how a base is packed as it is read. `spec` gives rank and scale; a
    rank above what a site allows is capped there. `errors` are those of `loftq_pack`, by site.
    """

    def __init__(
        self,
        format: str,  # noqa: A002 - the house's word
        spec: AdapterSpec,
        *,
        iterations: int = 5,
        seed: int = 0,
        options: Mapping[str, Any] | None = None,
    ):
        self.format = format
        self.spec = spec
        self.iterations = iterations
        self.seed = seed
        self.options = dict(options or {})
        self.factors: dict[str, Factors] = {}
        self.errors: dict[str, list[float]] = {}

    def __call__(self, name: str, weight: Tensor) -> Packed:
        generator = torch.Generator().manual_seed(mix(self.seed, site_key(name)) >> 1)
        rank = min(self.spec.rank_at(name), *weight.shape)
        packed, a, b, self.errors[name] = loftq_pack(
            weight, self.format, rank, self.spec.scale(name), self.iterations, generator=generator, **self.options
        )
        self.factors[name] = Factors("lora", {"a": a.cpu(), "b": b.cpu()})
        return packed
