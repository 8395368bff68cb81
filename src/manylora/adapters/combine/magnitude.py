"""Each delta trimmed to its largest entries, then the weighted sum; nothing is scaled up."""

from __future__ import annotations

from collections.abc import Sequence

from manylora.adapters.combine.change import Change, Dense, Options, largest, weighted_sum


class Magnitude:
    name = "magnitude"
    takes = frozenset({"rank", "density"})
    exact = False

    def __call__(
        self, changes: Sequence[Change], weights: Sequence[float], members: Sequence[int], options: Options
    ) -> Change:
        return weighted_sum([Dense(largest(change.dense(), options.density)) for change in changes], weights)


MAGNITUDE = Magnitude()
