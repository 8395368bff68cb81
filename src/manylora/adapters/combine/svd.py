"""The weighted sum of the deltas, cut to its best approximation of one rank."""

from __future__ import annotations

from collections.abc import Sequence

from manylora.adapters.combine.change import Change, Options, weighted_sum


class Svd:
    name = "svd"
    takes = frozenset({"rank"})
    exact = False

    def __call__(
        self, changes: Sequence[Change], weights: Sequence[float], members: Sequence[int], options: Options
    ) -> Change:
        return weighted_sum(changes, weights)


SVD = Svd()
