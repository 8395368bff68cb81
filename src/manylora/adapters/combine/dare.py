"""DARE: entries of each delta dropped at random and the rest scaled up, then the weighted sum: its mean is the sum.

Source: DARE (2311.03099), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manylora.adapters.combine.change import Change, Dense, Options, weighted_sum
from manylora.ops.dropout import mix, site_key


class Dare:
    name = "dare"
    takes = frozenset({"rank", "density", "seed"})
    exact = False

    def __call__(
        self, changes: Sequence[Change], weights: Sequence[float], members: Sequence[int], options: Options
    ) -> Change:
        kept = []
        for change, member in zip(changes, members, strict=True):
            value = change.dense()
            # Of (seed, adapter, place) alone: the order of sites and their number do not move a draw.
            stream = mix(mix(options.seed, member), site_key(options.place))
            drawn = torch.rand(value.shape, generator=torch.Generator().manual_seed(stream >> 1))
            kept.append(Dense(value * (drawn < options.density) / options.density))
        return weighted_sum(kept, weights)


DARE = Dare()
