"""The weighted sum of the deltas, exactly: factors one under another, so the ranks add up."""

from __future__ import annotations

from collections.abc import Sequence

from manylora.adapters.combine.change import Change, Options, weighted_sum


class Linear:
    name = "linear"
    takes: frozenset[str] = frozenset()
    exact = True

    def __call__(
        self, changes: Sequence[Change], weights: Sequence[float], members: Sequence[int], options: Options
    ) -> Change:
        return weighted_sum(changes, weights)


LINEAR = Linear()
