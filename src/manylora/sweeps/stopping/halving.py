"""Successive halving: all trials train to a level, the best 1 / reduction of them go on, and so forth.

Source: Jamieson and Talwalkar, arXiv 1502.07943, algorithm 1. With 27 trials, reduction 3 and the first level at
1/27 of the budget, the others lie at 1/9 and 1/3 with 9 and 3 trials, and one trains to its end: 3 full budgets in all
instead of 27.
"""

from __future__ import annotations

from manylora.sweeps.stopping.reports import OneOfSoMany
from manylora.sweeps.stopping.rule import StopSettings, Verdict


class SuccessiveHalving(OneOfSoMany):
    """The synchronous rule: a level is judged when every trial that entered it has reported.

    Of n trials max(1, floor(n / reduction)) are kept, so 81 give 27, 9, 3, 1 and 20 give 6, 2, 1 (where the ceiling of
    Hyperband's formula would keep 7, 3, 1); dead trials count in n. Equal losses go by trial number. Fewer trials than
    `reduction` and no `first_share`: no level, all train to their end.
    """

    def __init__(self, num_trials: int, settings: StopSettings) -> None:
        super().__init__(num_trials, settings)
        self._num_judged = 0  # levels whose verdicts are given; they are judged from the first to the last

    def verdicts(self) -> dict[int, Verdict]:
        news = self._ledger.stop_the_dead()
        for level in range(self._num_judged):
            # Too late: the level was judged without it, by `finish`.
            news |= {trial: self._ledger.stop(trial) for trial in self._ledger.waiting(level)}
        while self._num_judged < len(self.shares) and self._is_complete(self._num_judged):
            news |= self._judge(self._num_judged)
        return self._ledger.waits() | news

    def finish(self) -> dict[int, Verdict]:
        """Judges a level that some trials never came to by those that did; n is then their number."""
        news: dict[int, Verdict] = {trial: verdict for trial, verdict in self.verdicts().items() if verdict != "wait"}
        # Whoever is let go will report again, so the levels after it are not yet at their end.
        while self._has_reports(self._num_judged) and "go" not in news.values():
            news |= self._judge(self._num_judged)
        return news

    def _has_reports(self, level: int) -> bool:
        return level < len(self.shares) and bool(self._ledger.losses[level])

    def _is_complete(self, level: int) -> bool:
        entered = self._ledger.gone[level - 1] if level else range(self._ledger.num_trials)
        return all(trial in self._ledger.losses[level] for trial in entered)

    def _judge(self, level: int) -> dict[int, Verdict]:
        ledger = self._ledger
        self._num_judged = level + 1
        ranked = ledger.ranked(level)
        kept = set(ranked[: max(1, len(ranked) // self._reduction)])
        return {t: ledger.let_go(t, level) if t in kept else ledger.stop(t) for t in ledger.waiting(level)}
