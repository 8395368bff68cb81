"""TIES: each delta trimmed to its largest entries, a sign elected for each entry, the mean of those that agree.

Source: TIES-Merging (2306.01708), section 4; the mean is not scaled (lambda = 1). A weight counts in the election and
in the mean, so with equal weights this is the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from manylora.adapters.combine.change import Change, Dense, Options, largest


class Ties:
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
