"""EVA: a starts as the directions in which a site's inputs vary most, and ranks go to the sites that vary in more.

Source: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation" (2410.07170), algorithm 1.
There an incremental decomposition follows the inputs X (n, I) of a site. Here their sum of squares X^T X is added up in
float64: its leading directions are those of X itself, whatever the order and the number of batches, at I^2 numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.methods.inits.init import Init, InputReader
from manylora.methods.inits.svd import leading_directions
from manylora.spec import AdapterSpec
from manylora.types import Site, Start

MOST_RANK = 2.0
"""How many times the rank that was asked for one site may get at most: rho of the paper."""
SETTLED = 0.99
"""The cosine between a direction and the span of those of half the data from which it has settled: tau of the paper."""


@dataclass(frozen=True, slots=True)
class Directions:
    """`vectors` (K, I): unit directions of a site's inputs, the leading first. `shares` (K,): each one's share of the
    sum of squares of all inputs, which is its share of the explained variance.
    """

    vectors: Tensor
    shares: Tensor


class InputGram:
    """X^T X of the inputs X (n, I) of a site, and the directions in which they are largest."""

    def __init__(self, site: Site, rank: int):
        self._width = site.out_in[1]
        self._count = min(math.ceil(MOST_RANK * rank), self._width)
        self._gram: Tensor | None = None
        self._seen = 0
        self._solved: tuple[int, Directions] | None = None

    def add(self, inputs: Tensor) -> None:
        wide = inputs.double()
        if self._gram is None:
            self._gram = wide.new_zeros(self._width, self._width)
        self._gram.addmm_(wide.t(), wide)
        self._seen += len(wide)

    def settled(self) -> bool:
        before = self._solved
        found = self.result()
        if before is None or self._seen < self._count:
            return False
        cosines = torch.linalg.vector_norm(found.vectors @ before[1].vectors.t(), dim=1)
        present = found.shares > torch.finfo(torch.float64).eps * self._width
        return bool((cosines[present] >= SETTLED).all())

    def result(self) -> Directions:
        if self._solved is None or self._solved[0] != self._seen:
            self._solved = self._seen, self._solve()
        return self._solved[1]

    def _solve(self) -> Directions:
        gram = torch.zeros(self._width, self._width, dtype=torch.float64) if self._gram is None else self._gram
        _, squares, vectors = leading_directions(gram, self._count, torch.Generator().manual_seed(0))
        total = gram.trace()
        shares = squares / total if total > 0 else torch.zeros_like(squares)
        return Directions(vectors.float().cpu(), shares.cpu())


def shared_ranks(sites: Sequence[Site], inputs: Mapping[str, Directions], spec: AdapterSpec) -> dict[str, int]:
    """The ranks that were asked for, dealt out anew: to the largest shares of variance over all sites.

    Their sum is kept, as far as sites can take it: no site gets more than `MOST_RANK` times its own, or than its size.
    """
    budget = sum(spec.rank_at(site.name) for site in sites)
    bids: list[tuple[float, int]] = []
    for place, site in enumerate(sites):
        most = min(math.ceil(MOST_RANK * spec.rank_at(site.name)), *site.out_in)
        bids += [(-share, place) for share in inputs[site.name].shares[:most].tolist()]
    ranks = dict.fromkeys((site.name for site in sites), 0)
    for _, place in sorted(bids)[:budget]:
        ranks[sites[place].name] += 1
    return ranks


def eva(start: Start) -> tuple[Tensor, Tensor]:
    """a (R, I) the leading directions of the site's inputs, and b (O, R) = 0."""
    directions: Directions = start.inputs  # pyright: ignore[reportAssignmentType] - what `result` gave
    return directions.vectors[: start.rank].clone(), torch.zeros(start.site.out_in[0], start.rank)


EVA = Init(eva, reads=InputReader(InputGram, lambda site: 8 * site.out_in[1] ** 2, shared_ranks))
