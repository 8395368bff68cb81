"""Searches: how the values of a trial are chosen; one file each, one line in this table. No torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from manylora.sweeps.space import Space
from manylora.table import Table

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """All that a proposal may depend on."""

    space: Space
    number: int
    """Of the trial, from 0."""
    num_trials: int
    seed: int
    """Of the whole search."""
    draw: int
    """The seed of this one proposal, below 2^32: from the search's seed, the trial's number and the attempt."""
    trials: Sequence[FrozenTrial]
    """Those with lower numbers, as optuna has them: running, complete, pruned or failed."""


Proposer = Callable[[Question], dict[str, Any]]
"""The values of a trial by key, as optuna stores them. A pure function."""

SEARCHES: Table[Proposer] = Table(
    "search",
    {
        "grid": "manylora.sweeps.searches.grid:propose",
        "random": "manylora.sweeps.searches.uniform:propose",
        "tpe": "manylora.sweeps.searches.tpe:propose",
    },
)
