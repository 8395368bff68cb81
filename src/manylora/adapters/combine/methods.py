"""Ways to make one change out of several."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manylora.adapters.combine.change import Change, Dense, Options, largest, weighted_sum
from manylora.ops.dropout import mix, site_key


class Linear:
    """The weighted sum of the deltas, exactly: factors one under another, so the ranks add up."""

    name = "linear"
    takes: frozenset[str] = frozenset()
    exact = True

    def __call__(
        self, changes: Sequence[Change], weights: Sequence[float], members: Sequence[int], options: Options
    ) -> Change:
        return weighted_sum(changes, weights)


LINEAR = Linear()


class Svd:
    """The weighted sum of the deltas, cut to its best approximation of one rank."""

    name = "svd"
    takes = frozenset({"rank"})
    exact = False

    def __call__(
        self, changes: Sequence[Change], weights: Sequence[float], members: Sequence[int], options: Options
    ) -> Change:
        return weighted_sum(changes, weights)


SVD = Svd()


class Ties:
    """TIES: each delta trimmed to its largest entries, a sign elected for each entry, the mean of those that agree.

    Source: TIES-Merging (2306.01708), section 4; the mean is not scaled (lambda = 1). A weight counts in the election
    and in the mean, so with equal weights this is the paper's.
    """

    name = "ties"
    takes = frozenset({"rank", "density"})
    exact = False

    def __call__(
        self, changes: Sequence[Change], weights: Sequence[float], members: Sequence[int], options: Options
    ) -> Change:
        trimmed = torch.stack([largest(change.dense(), options.density) for change in changes])
        shape = (-1,) + (1,) * (trimmed.dim() - 1)
        by = torch.tensor(weights, dtype=trimmed.dtype).view(shape)
        signed = trimmed * by
        elected = signed.sum(0).sign()
        agrees = (signed.sign() == elected) & (signed != 0)
        count = (agrees * by.abs()).sum(0)
        total = (signed * agrees).sum(0)
        return Dense(torch.where(count > 0, total / count.where(count > 0, torch.ones_like(count)), 0.0))


TIES = Ties()


class Dare:
    """DARE: entries of each delta dropped at random and the rest scaled up, then the weighted sum: its mean is the sum.

    Source: DARE (2311.03099), section 3.
    """

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


class Magnitude:
    """Each delta trimmed to its largest entries, then the weighted sum; nothing is scaled up."""

    name = "magnitude"
    takes = frozenset({"rank", "density"})
    exact = False

    def __call__(
        self, changes: Sequence[Change], weights: Sequence[float], members: Sequence[int], options: Options
    ) -> Change:
        return weighted_sum([Dense(largest(change.dense(), options.density)) for change in changes], weights)


MAGNITUDE = Magnitude()
