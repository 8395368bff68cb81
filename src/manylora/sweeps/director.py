"""The director of a sweep: proposes trials, judges them by their members' losses, and says what each loop does next.

It answers loops by name alone, so one may ask it, or several on other machines. All it knows is the list of what it was
told, in order; replaying the list makes it again. No torch.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from manylora.config import Config
from manylora.errors import ConfigError
from manylora.sweeps.leaderboard import Entry, State, ranked
from manylora.sweeps.search import Search
from manylora.sweeps.stopping.rule import Rule
from manylora.sweeps.trials import Trials
from manylora.training.orders import Ending, Order, Report, Verdict


@dataclass(slots=True)
class _Member:
    """What is known of a member: where it stands, its last report, and how it ended."""

    name: str
    trial: int
    state: State = "running"
    reason: str = ""
    level: int = -1
    tokens: int = 0
    full_tokens: int = 0
    loss: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    verdict: Verdict | None = None
    """The last word on its last report."""

    @property
    def ended(self) -> bool:
        return self.state in ("done", "stopped", "retired")


@dataclass(slots=True)
class _Trial:
    number: int
    values: dict[str, Any]
    members: list[str]
    level: int = -1
    """The last level at which the rule was told of it."""


class Director:
    """A source of members (`training.orders.Source`) that searches.

    `journal` is what it was told; `restore` replays one. `full_tokens` is what a trial trains to its end.
    """

    def __init__(self, trials: Trials, search: Search, rule: Rule):
        self._trials = trials
        self._search = search
        self._rule = rule
        self.journal: list[list[Any]] = []
        self.members: dict[str, _Member] = {}
        self.trials: dict[int, _Trial] = {}
        self._unstarted: deque[str] = deque()
        self._orders: deque[Order] = deque()  # continue and dismiss, for members that wait

    # -- what loops ask ------------------------------------------------------------------------------------------------

    def next(self, *, free: bool, idle: bool) -> Order | None:
        """A dismissal needs no slot; then those that wait and may go on, then new members, in order of trial."""
        order = self._next(free)
        if order is None and free and idle and self._nothing_runs() and self._waiting():
            self._finish()
            order = self._next(free)
        return order

    def judge(self, reports: Sequence[Report]) -> dict[str, Verdict]:
        """Verdicts for the reports of one tick; those that wait for others get theirs through `next` later.

        A member that went back to an earlier state of itself reports again, and is answered as before.
        """
        again = {report.member: self._again(report) for report in reports if self._is_known(report)}
        reports = [report for report in reports if report.member not in again]
        return again | (self._judge(reports) if reports else {})

    def _judge(self, reports: Sequence[Report]) -> dict[str, Verdict]:
        self.journal.append(["judge", [asdict(report) | {"loss": _plain(report.loss)} for report in reports]])
        asked = {}
        for report in reports:
            member = self.members[report.member]
            member.level, member.tokens, member.loss = report.level, report.tokens, _plain(report.loss)
            member.verdict = None
            asked[member.name] = member
        for number in sorted({member.trial for member in asked.values()}):
            self._tell_rule(self.trials[number])
        answers = self._settle(asked)
        for name, member in asked.items():
            if name not in answers:
                member.state = "waiting"
                answers[name] = Verdict("wait")
        return answers

    def started(self, member: str, full_tokens: int) -> None:
        if self.members[member].full_tokens == full_tokens:
            return  # it goes on, after a wait or elsewhere
        self.journal.append(["started", member, full_tokens])
        self.members[member].full_tokens = full_tokens

    def failed(self, member: str, reason: str) -> bool:
        """A member that could not be made: its trial is out, the sweep goes on."""
        self.ended(Ending(member, "retired", reason, 0, None, {}))
        return True

    def ended(self, ending: Ending) -> None:
        member = self.members[ending.member]
        if member.ended:
            return  # told twice
        self.journal.append(["ended", asdict(ending) | {"scores": dict(ending.scores)}])
        member.state, member.reason, member.tokens = _state(ending.state), ending.reason, ending.tokens
        member.loss, member.scores = ending.loss, dict(ending.scores)
        trial = self.trials[member.trial]
        self._tell_rule(trial)
        self._settle({})
        own = self._of(trial)
        if all(one.ended for one in own):
            entry = self.entry(trial.number)
            told = "done" if entry.state == "done" else "stopped" if entry.state == "stopped" else "failed"
            self._search.tell(trial.number, entry.loss, told)

    def state(self) -> dict[str, Any]:
        return {"journal": self.journal}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Live through a journal again; the search finds in its own file what it proposed."""
        for what, *told in state["journal"]:
            match what:
                case "next":
                    self._next(free=True, expected=Order(**told[0]))
                case "finish":
                    self._finish()
                case "judge":
                    self.judge([Report(**one | {"loss": _number(one["loss"])}) for one in told[0]])
                case "started":
                    self.started(*told)
                case "ended":
                    self.ended(Ending(**told[0]))

    # -- what people ask -----------------------------------------------------------------------------------------------

    def config(self, member: str) -> Config:
        """The configuration that trains a member alone."""
        return self._trials.config(member, self.trials[self.members[member].trial].values)

    def seen(self, member: str, tokens: int, loss: float | None) -> None:
        """What a member has trained by now and its last held-out loss, for those who look on; decides nothing."""
        known = self.members[member]
        known.tokens = tokens
        known.loss = known.loss if loss is None else _plain(loss)

    def entries(self) -> list[Entry]:
        """Every trial that was proposed, as it stands, in order of number."""
        return [self.entry(number) for number in self.trials]

    def entry(self, number: int) -> Entry:
        """One trial as it stands: a member that has not begun yet counts as running."""
        trial = self.trials[number]
        own = self._of(trial)
        losses = [member.loss for member in own if member.loss is not None]
        whole = len(losses) == len(own)
        first = min(own, key=lambda member: math.inf if member.loss is None else member.loss)
        names = set.intersection(*(set(member.scores) for member in own))
        return Entry(
            trial=number,
            member=first.name,
            state=_state_of([member.state for member in own]),
            tokens=sum(member.tokens for member in own),
            full_tokens=sum(member.full_tokens for member in own),
            loss=statistics.fmean(losses) if whole else None,
            spread=statistics.stdev(losses) if whole and len(losses) > 1 else None,
            metrics={name: statistics.fmean(member.scores[name] for member in own) for name in sorted(names)},
            values=trial.values,
            members=tuple(trial.members),
            reason=next((member.reason for member in own if member.reason), ""),
        )

    def under_way(self) -> list[str]:
        """The members that were begun and have not ended: they run somewhere, or wait."""
        unstarted = set(self._unstarted)
        return [name for name, member in self.members.items() if not member.ended and name not in unstarted]

    def best(self) -> Entry | None:
        """The trial with the lowest loss, None where none has one."""
        found = ranked(entry for entry in self.entries() if entry.loss is not None)
        return found[0] if found else None

    @property
    def num_trials(self) -> int:
        return self._search.num_trials

    # -- within --------------------------------------------------------------------------------------------------------

    def _next(self, free: bool, expected: Order | None = None) -> Order | None:
        order = self._take(free, expected)
        if order is not None:
            self.journal.append(["next", asdict(order)])
            self.members[order.member].state = "running"
        return order

    def _take(self, free: bool, expected: Order | None) -> Order | None:
        if expected is not None and expected in self._orders:
            self._orders.remove(expected)
            return expected
        for order in self._orders:
            if free or order.action == "dismiss":
                self._orders.remove(order)
                return order
        if not free:
            return None
        while not self._unstarted and len(self.trials) < self._search.num_trials:
            self._propose()
        return Order("start", self._unstarted.popleft()) if self._unstarted else None

    def _propose(self) -> None:
        """Draw the next trial; values that do not go together end it before it begins."""
        number = len(self.trials)
        values = self._search.propose(number)
        trial = self.trials[number] = _Trial(number, values, self._trials.members(number))
        for name in trial.members:
            self.members[name] = _Member(name, number)
        try:
            for name in trial.members:
                self._trials.config(name, values)
        except ConfigError as error:
            for name in trial.members:
                self.members[name].state, self.members[name].reason = "retired", error.what
            self._tell_rule(trial)
            self._search.tell(number, None, "failed")
            self._settle({})
            return
        self._unstarted.extend(trial.members)

    def _tell_rule(self, trial: _Trial) -> None:
        """Report a trial to the rule once all its members have come to a level, or have ended."""
        own = self._of(trial)
        running = [member.level for member in own if not member.ended]
        level = trial.level + 1
        if level >= len(self._rule.shares) or (running and min(running) < level):
            return
        trial.level = level
        dead = any(member.state == "retired" or member.loss is None for member in own)
        loss = math.inf if dead else statistics.fmean(member.loss for member in own if member.loss is not None)
        self._rule.report(trial.number, level, loss)
        if running:
            self._search.report(trial.number, sum(member.tokens for member in own), loss)

    def _finish(self) -> None:
        self.journal.append(["finish"])
        self._apply(self._rule.finish(), {})
        self._settle({})

    def _settle(self, asked: Mapping[str, _Member]) -> dict[str, Verdict]:
        """Carry out what the rule says until it says nothing new: a trial that ended counts at further levels."""
        answers: dict[str, Verdict] = {}
        while True:
            verdicts = self._rule.verdicts()
            if all(verdict == "wait" for verdict in verdicts.values()):
                return answers
            answers |= self._apply(verdicts, asked)

    def _apply(self, verdicts: Mapping[int, str], asked: Mapping[str, _Member]) -> dict[str, Verdict]:
        """Carry verdicts to the members: at once to those that were asked about, by an order to those that wait."""
        answers: dict[str, Verdict] = {}
        for number in sorted(verdicts):
            trial = self.trials[number]
            verdict = verdicts[number]
            if verdict == "wait":
                continue
            if verdict == "go":
                before = trial.level
                self._tell_rule(trial)
                if trial.level > before:
                    continue  # it has come to the next level too, or has ended: what the rule says there counts
            reason = "" if verdict == "go" else f"judged at {self._trials.levels[trial.level]:,} trained tokens"
            for member in self._of(trial):
                if member.ended:
                    continue
                member.verdict = Verdict("go" if verdict == "go" else "stop", reason)
                if member.name in asked:
                    member.state = "running"
                    answers[member.name] = member.verdict
                elif member.state == "waiting":
                    self._orders.append(Order("continue" if verdict == "go" else "dismiss", member.name, reason))
        return answers

    def _is_known(self, report: Report) -> bool:
        return report.level <= self.members[report.member].level

    def _again(self, report: Report) -> Verdict:
        member = self.members[report.member]
        if report.level < member.level:
            return Verdict("go")
        # One that is let go or stopped while it waits hears of it by an order.
        return Verdict("wait") if member.state == "waiting" or member.verdict is None else member.verdict

    def _of(self, trial: _Trial) -> list[_Member]:
        return [self.members[name] for name in trial.members]

    def _waiting(self) -> bool:
        return any(member.state == "waiting" for member in self.members.values())

    def _nothing_runs(self) -> bool:
        started = [member for member in self.members.values() if member.name not in self._unstarted]
        return not any(member.state == "running" for member in started)


def _state(word: str) -> State:
    return "done" if word == "done" else "stopped" if word == "stopped" else "retired"


def _state_of(states: Sequence[State]) -> State:
    """A trial's state from its members': the least advanced decides, and one that was retired retires it."""
    for state in ("running", "waiting", "retired", "stopped"):
        if state in states:
            return state
    return "done"


def _plain(loss: float | None) -> float | None:
    return None if loss is None or not math.isfinite(loss) else loss


def _number(loss: float | None) -> float:
    return math.nan if loss is None else loss
