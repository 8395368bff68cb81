"""The median rule: a trial that is worse than half of the others at the same point is stopped.

Source: Golovin et al., Google Vizier, KDD 2017, section 3.2.2, with the others' losses at the level instead of their
running averages: eval losses fall over most of a run, and an average would lag behind.
"""

from __future__ import annotations

import statistics
from typing import ClassVar

from manylora.sweeps.stopping.reports import OverLevels
from manylora.sweeps.stopping.rule import StopSettings, Verdict

STEP = 0.1
"""Levels lie a tenth of the budget apart."""
FIRST_SHARE = 0.2
"""The first level unless it is set: before that, warmup decides more than the trial does."""


class Median(OverLevels):
    """Stops a trial whose best loss so far is above the median of the other trials' losses at the level.

    Judged on the spot, so nothing waits; with fewer than `min_reports` others at the level, or on a tie, it goes on.
    Those reported between the same two calls of `verdicts` are judged against each other too.
    """

    reads: ClassVar[frozenset[str]] = frozenset({"first_share", "min_reports"})

    def __init__(self, num_trials: int, settings: StopSettings) -> None:
        first = settings.first_share or FIRST_SHARE
        shares = [round(first + STEP * level, 9) for level in range(10)]
        super().__init__(num_trials, tuple(share for share in shares if share < 1))
        self._min_reports = settings.min_reports

    def verdicts(self) -> dict[int, Verdict]:
        ledger = self._ledger
        news = ledger.stop_the_dead()
        for level in range(len(self.shares)):
            judged = {trial: self._is_behind(trial, level) for trial in ledger.waiting(level)}
            news |= {t: ledger.stop(t) if behind else ledger.let_go(t, level) for t, behind in judged.items()}
        return news

    def finish(self) -> dict[int, Verdict]:
        return self.verdicts()

    def _is_behind(self, trial: int, level: int) -> bool:
        others = [loss for other, loss in self._ledger.losses[level].items() if other != trial]
        if len(others) < self._min_reports:
            return False
        best = min(losses[trial] for losses in self._ledger.losses[: level + 1] if trial in losses)
        return best > statistics.median(others)
