"""What was reported and decided so far, level by level: what every rule keeps."""

from __future__ import annotations

import math
from typing import ClassVar

from manylora.sweeps.stopping.rule import StopSettings, Verdict, own_first_share, rising_shares


class Reports:
    """Losses by level and trial, and who was let go from each level or stopped."""

    def __init__(self, num_trials: int, num_levels: int):
        self.num_trials = num_trials
        self.losses: list[dict[int, float]] = [{} for _ in range(num_levels)]
        self.gone: list[set[int]] = [set() for _ in range(num_levels)]
        self.stopped: set[int] = set()

    def report(self, trial: int, level: int, loss: float) -> bool:
        """Whether the report was new. A loss that is not finite is kept as infinity.

        Raises:
            ValueError: see `Rule.report`.
        """
        if not 0 <= trial < self.num_trials:
            raise ValueError(f"trial {trial} is reported, and the sweep has {self.num_trials}, counted from 0")
        if not 0 <= level < len(self.losses):
            raise ValueError(
                f"trial {trial} reports at level {level}, and there are {len(self.losses)}, counted from 0"
            )
        if trial in self.stopped or trial in self.losses[level]:
            return False
        if level > 0:
            if trial not in self.losses[level - 1]:
                raise ValueError(f"trial {trial} reports at level {level} without a report at level {level - 1}")
            # It came here, so it was let go, whoever remembers that: see `Rule`.
            self.gone[level - 1].add(trial)
        self.losses[level][trial] = loss if math.isfinite(loss) else math.inf
        return True

    def ranked(self, level: int) -> list[int]:
        """Who reported at a level, best first; equal losses by trial number."""
        losses = self.losses[level]
        return sorted(losses, key=lambda trial: (losses[trial], trial))

    def waiting(self, level: int) -> list[int]:
        """Who reported at a level and has no final verdict there, best first."""
        return [trial for trial in self.ranked(level) if trial not in self.gone[level] and trial not in self.stopped]

    def is_dead(self, trial: int, level: int) -> bool:
        return math.isinf(self.losses[level][trial])

    def let_go(self, trial: int, level: int) -> Verdict:
        self.gone[level].add(trial)
        return "go"

    def stop(self, trial: int) -> Verdict:
        self.stopped.add(trial)
        return "stop"

    def stop_the_dead(self) -> dict[int, Verdict]:
        """Stops whoever reported a loss that is not finite."""
        levels = range(len(self.losses))
        return {t: self.stop(t) for level in levels for t in self.waiting(level) if self.is_dead(t, level)}

    def waits(self) -> dict[int, Verdict]:
        return {trial: "wait" for level in range(len(self.losses)) for trial in self.waiting(level)}


class OverLevels:
    """What rules share that judge at levels: their shares of a trial's tokens, and what was reported there."""

    def __init__(self, num_trials: int, shares: tuple[float, ...]):
        self.shares = shares
        self._ledger = Reports(num_trials, len(shares))

    def report(self, trial: int, level: int, loss: float) -> None:
        self._ledger.report(trial, level, loss)


class OneOfSoMany(OverLevels):
    """A rule of which one of `reduction` goes on, at levels that lie a factor of `reduction` apart."""

    reads: ClassVar[frozenset[str]] = frozenset({"reduction", "first_share"})

    def __init__(self, num_trials: int, settings: StopSettings):
        first = settings.first_share or own_first_share(num_trials, settings.reduction)
        super().__init__(num_trials, rising_shares(first, settings.reduction) if first else ())
        self._reduction = settings.reduction
