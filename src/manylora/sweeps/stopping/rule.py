"""What a stopping rule is, and what can be set about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from manylora.errors import ConfigError

Verdict = Literal["go", "wait", "stop"]

LATEST_SPLIT = 10
"""No rule judges by itself before one of so many parts of the token budget: within the warmup losses tell nothing of
the end. Judged at 1/27, the best of 32 trials was lost; at a tenth it was kept (docs/LOG.md, bench/halving.py)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StopSettings:
    """`sweep.stop`: each rule reads some of these (`Rule.reads`).

    Raises:
        ConfigError: a value out of range.
    """

    reduction: int = 3
    """successive-halving, asha: one of so many trials is kept at a level, and levels lie this factor apart. Source:
    Hyperband (arXiv 1603.06560, section 2.6) recommends 3 or 4."""
    first_share: float | None = None
    """Share of the full token budget at the first level. None: for successive-halving and asha 1 / reduction^k with
    the largest k that leaves a trial for each level and is no less than a tenth; for median 0.2."""
    min_reports: int = 4
    """median: how many other trials must have reported at a level before one is judged there."""

    def __post_init__(self) -> None:
        for name, least in (("reduction", 2), ("min_reports", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"sweep.stop.{name} is {value!r}", allowed=f"a whole number of at least {least}")
        share = self.first_share
        if share is None:
            return
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share < 1:
            raise ConfigError(
                f"sweep.stop.first_share is {share!r}",
                allowed="a share of the token budget, above 0 and below 1; null: the rule's own",
            )


class Rule(Protocol):
    """Who trains on, who waits and who is stopped, judged by eval losses at equal counts of trained tokens.

    `shares` are the levels: rising shares of the full token budget, each in (0, 1). A trial that was reported may train
    on once its verdict is "go"; a rule that never says "wait" judges on the spot. After the last level a trial trains
    to its end and is judged no more.

    The state of a rule is its reports: replaying them in order, with `verdicts` called after the same groups, gives the
    same verdicts, and the order of reports between two calls does not matter. Calls of `finish` may be left out of a
    replay: a trial that reports at a level while it still waits at the one before is taken to have been let go there,
    and what `finish` stopped waits until it is called again.

    A loss that is not finite is a dead trial's: it counts among those that reported and is stopped, wherever it ranks.
    A trial that finished early is reported at its next level with its final loss, and again after each "go".
    """

    reads: ClassVar[frozenset[str]]
    """The settings that change what this rule does."""
    shares: tuple[float, ...]

    def __init__(self, num_trials: int, settings: StopSettings) -> None: ...

    def report(self, trial: int, level: int, loss: float) -> None:
        """Takes note of an eval loss. The first report of a trial at a level counts; those of stopped trials do not.

        Raises:
            ValueError: no such trial or level, or a level that the trial cannot have come to.
        """
        ...

    def verdicts(self) -> dict[int, Verdict]:
        """Of every trial whose last report has no final verdict yet; "go" and "stop" are given once for each report."""
        ...

    def finish(self) -> dict[int, Verdict]:
        """The last word when nothing runs and nothing can start any more: whoever waits is let go if the rule's count
        still lets it, and is stopped otherwise. What was let go runs and reports again; then this is called again."""
        ...


def rising_shares(first: float, factor: int) -> tuple[float, ...]:
    """`first`, `first * factor`, ... as far as they stay below 1."""
    # A last level within rounding of the whole budget would judge trials that have finished.
    count = math.ceil(math.log(1 / first, factor) - 1e-9)
    return tuple(first * factor**level for level in range(count))


def own_first_share(num_trials: int, factor: int) -> float | None:
    """1 / factor^k with the largest k for which factor^k trials exist and the share is no less than a tenth.

    k is at least 1, whatever the factor; None where there are fewer trials than that.
    """
    depth = 0
    # Whole numbers: the logarithm of 243 to base 3 is 4.999... in floating point.
    while factor ** (depth + 1) <= num_trials and (depth == 0 or factor ** (depth + 1) <= LATEST_SPLIT):
        depth += 1
    return float(factor) ** -depth if depth else None
