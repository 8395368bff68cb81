"""No early stop: every trial trains to its end."""

from __future__ import annotations

from typing import ClassVar

from manylora.sweeps.stopping.rule import StopSettings, Verdict


class RunAll:
    """A rule without levels: nothing is reported to it and nothing is stopped."""

    reads: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, num_trials: int, settings: StopSettings) -> None:
        self.shares: tuple[float, ...] = ()

    def report(self, trial: int, level: int, loss: float) -> None:
        raise ValueError(f"trial {trial} reports at level {level}, and this rule has none")

    def verdicts(self) -> dict[int, Verdict]:
        return {}

    def finish(self) -> dict[int, Verdict]:
        return {}
