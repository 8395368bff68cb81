"""ASHA, successive halving without a barrier: a trial is promoted once it is among the best of those that came so far.

Source: Li et al., arXiv 1810.05934, algorithm 2. A trial may be promoted that the synchronous rule would have stopped,
since better ones came later; in exchange nothing waits for the slowest.
"""

from __future__ import annotations

from manylora.sweeps.stopping.reports import OneOfSoMany
from manylora.sweeps.stopping.rule import Verdict


class Asha(OneOfSoMany):
    """The asynchronous rule: of the n trials that reported at a level so far, the best floor(n / reduction) go on.

    Two things are ours. A trial that no later report could promote is stopped at once, not kept waiting. And when
    nothing runs any more, a level that has promoted nobody promotes its best trial, so that at least one trains to its
    end. With both, ASHA lets go and stops exactly whom successive halving does, if all that enter a level report there
    between the same two calls of `verdicts` and `finish` is called whenever nothing runs.
    """

    def verdicts(self) -> dict[int, Verdict]:
        ledger = self._ledger
        news = ledger.stop_the_dead()
        for level in range(len(self.shares)):
            ranked = ledger.ranked(level)
            best = set(ranked[: len(ranked) // self._reduction])
            news |= {trial: ledger.let_go(trial, level) for trial in ledger.waiting(level) if trial in best}
        news |= self._stop_the_hopeless()
        return ledger.waits() | news

    def finish(self) -> dict[int, Verdict]:
        ledger = self._ledger
        news: dict[int, Verdict] = {trial: verdict for trial, verdict in self.verdicts().items() if verdict != "wait"}
        if "go" in news.values():
            return news  # they will report again, which may promote others
        for level in range(len(self.shares)):
            waiting = ledger.waiting(level)
            if waiting and not ledger.gone[level]:
                news[waiting[0]] = ledger.let_go(waiting[0], level)
            news |= {trial: ledger.stop(trial) for trial in ledger.waiting(level)}
        return news

    def _stop_the_hopeless(self) -> dict[int, Verdict]:
        """Stops those whose rank no report to come can make good: ranks only fall, and the count has a bound."""
        ledger = self._ledger
        news: dict[int, Verdict] = {}
        most = ledger.num_trials  # that can ever report at the level
        for level in range(len(self.shares)):
            ranked = ledger.ranked(level)
            ever_best = set(ranked[: max(1, most // self._reduction)])
            news |= {trial: ledger.stop(trial) for trial in ledger.waiting(level) if trial not in ever_best}
            to_come = most - len(ranked)
            most = len(ledger.gone[level]) + len(ledger.waiting(level)) + to_come
        return news
