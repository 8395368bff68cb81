"""Where a loop's members come from, and who says which of them go on: a single job, or a search. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Action = Literal["start", "continue", "dismiss"]
Judgement = Literal["go", "wait", "stop"]


@dataclass(frozen=True, slots=True)
class Order:
    """What a loop is to do next: start a new member, continue one that waits, or dismiss it for good."""

    action: Action
    member: str
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """A member has trained as many tokens as one of its levels, and has this loss on the held-out rows."""

    member: str
    level: int
    tokens: int
    loss: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a member that was judged goes on at once, waits for others, or stops."""

    judgement: Judgement
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a member ended: its state, why, what it has trained, and its loss on the held-out rows."""

    member: str
    state: str
    reason: str
    tokens: int
    loss: float | None
    scores: Mapping[str, float]


class Source(Protocol):
    """Proposes members and judges them. One loop asks it, or several on other machines: it answers by name alone."""

    def next(self, *, free: bool, idle: bool) -> Order | None:
        """What to do next, None: nothing now. `free`: a slot is; `idle`: no member runs in the loop that asks."""
        ...

    def judge(self, reports: Sequence[Report]) -> Mapping[str, Verdict]:
        """A verdict for each report; those of one tick come together, so that their order cannot matter."""
        ...

    def started(self, member: str, full_tokens: int) -> None:
        """A member is in its slot; to its end it would train so many tokens."""
        ...

    def failed(self, member: str, reason: str) -> bool:
        """A member could not be made: its adapter or its data cannot be had. False: then nothing can go on."""
        ...

    def ended(self, ending: Ending) -> None:
        """A member will make no step any more."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        ...


class Given:
    """A source of members that are known from the start; nobody judges them."""

    def __init__(self, names: Sequence[str]):
        self._names = list(names)
        self._begun = 0

    def next(self, *, free: bool, idle: bool) -> Order | None:
        if not free or self._begun == len(self._names):
            return None
        self._begun += 1
        return Order("start", self._names[self._begun - 1])

    def judge(self, reports: Sequence[Report]) -> Mapping[str, Verdict]:
        return {report.member: Verdict("go") for report in reports}

    def started(self, member: str, full_tokens: int) -> None:
        pass

    def failed(self, member: str, reason: str) -> bool:
        return False

    def ended(self, ending: Ending) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {"begun": self._begun}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._begun = state["begun"]
