"""The change that one adapter makes to one parameter, and what combines several of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LowRank:
    """The change b a, scale folded in: a (R, I), b (O, R)."""

    a: Tensor
    b: Tensor

    def dense(self) -> Tensor:
        """(O, I)."""
        return self.b @ self.a


@dataclass(frozen=True, slots=True)
class Dense:
    """A change as it is, of any shape."""

    value: Tensor

    def dense(self) -> Tensor:
        return self.value


Change = LowRank | Dense


@dataclass(frozen=True, slots=True)
class Options:
    """`density`: the share of entries that is kept. `seed` and `place` make a draw a function of member, site and
    parameter. `place` is what a site and parameter are called."""

    density: float
    seed: int
    place: str


class Combining(Protocol):
    """One way: a weighted change out of several; adapters that do not reach the parameter are left out of `changes`.

    `members` says which adapter each change is of.
    """

    name: str
    takes: frozenset[str]
    """Options that it reads, of rank, density and seed; any other is refused."""
    exact: bool
    """Whether its result has as many ranks as it needs, so that nothing is lost."""

    def __call__(
        self, changes: Sequence[Change], weights: Sequence[float], members: Sequence[int], options: Options
    ) -> Change: ...


def weighted_sum(changes: Sequence[Change], weights: Sequence[float]) -> Change:
    """The exact weighted sum: factors one under another where all are low-rank."""
    low = [change for change in changes if isinstance(change, LowRank)]
    if len(low) == len(changes):
        a = torch.cat([change.a for change in low])
        b = torch.cat([weight * change.b for change, weight in zip(low, weights, strict=True)], dim=1)
        return LowRank(a, b)
    total = sum(weight * change.dense() for change, weight in zip(changes, weights, strict=True))
    assert isinstance(total, Tensor)
    return Dense(total)


def truncated(change: Change, rank: int) -> tuple[LowRank, float]:
    """The best change of at most `rank`, and |what is lost| / |change|.

    Of low-rank factors the dense matrix is never made: b a = Qb (Rb Ra^T) Qa^T, and the core in the middle is small.
    Factors share the singular values evenly, so that neither rounds worse than the other.
    """
    if isinstance(change, LowRank):
        left, right = torch.linalg.qr(change.b.double()), torch.linalg.qr(change.a.double().t())
        u, s, vh = torch.linalg.svd(left.R @ right.R.t(), full_matrices=False)
        u, vh = left.Q @ u, vh @ right.Q.t()
    else:
        u, s, vh = torch.linalg.svd(change.value.double(), full_matrices=False)
    rank = min(rank, len(s))
    total, kept = float(s.square().sum()), float(s[:rank].square().sum())
    lost = max(0.0, 1.0 - kept / total) ** 0.5 if total else 0.0
    root = s[:rank].sqrt()
    return LowRank((root[:, None] * vh[:rank]).float().contiguous(), (u[:, :rank] * root).float().contiguous()), lost


def largest(value: Tensor, density: float) -> Tensor:
    """The tensor with all but the largest entries set to zero: round(density * count) of them, at least one."""
    count = max(1, round(density * value.numel()))
    flat = value.abs().reshape(-1)
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[flat.topk(count).indices] = True  # by place and not by threshold: equal entries would all be kept
    return value * kept.view(value.shape)
