"""The hub of a sweep over several workers: hands out members, holds who has which, and takes back those of the dead.

It stands between the director and loops in other processes. Two things can go wrong there and not in one process: a
worker dies with members in its slots, and the file of a member that waits is not written yet when another worker could
go on with it. No torch, no Ray.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from manylora.config import Config
from manylora.files import raise_if_full
from manylora.sweeps.director import Director
from manylora.training.orders import Ending, Order, Report, Verdict

if TYPE_CHECKING:
    from manylora.training.loop import Recorder

FILE_NAME = "director.jsonl"


@dataclass(frozen=True, slots=True)
class State:
    """A state of a member that lies on disk: its step, and how many levels it has passed."""

    step: int
    level: int


@dataclass(frozen=True, slots=True)
class Handout:
    """An order, with what a worker needs to carry it out: the member's configuration, and the step it waits at."""

    order: Order
    config: Config
    step: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """What a worker asked for; its value may be None."""

    value: Any


class Shelf(Protocol):
    """Where states of members lie that any worker can take up."""

    def rescue(self, member: str, workers: Sequence[str] | None) -> State | None:
        """The last state of a member, where it waited or in the last checkpoint of workers (None: of all)."""
        ...

    def drop(self, member: str) -> None:
        """A member has ended; nobody takes it up again."""
        ...


class Log(Protocol):
    """The part of `runs.events.EventLog` that taking members back needs."""

    def drop_after(self, steps: Mapping[str, int]) -> int: ...


class Journal:
    """What a director was told, on disk before anybody hears its answer: one JSON line each.

    An unfinished last line, left by a process that was killed while it wrote, was never answered, and is removed.
    """

    def __init__(self, path: Path):
        self.path = path
        self._count = 0

    def read(self) -> list[list[Any]]:
        """All that was written, oldest first."""
        if not self.path.exists():
            return []
        *lines, torn = self.path.read_bytes().split(b"\n")
        if torn:
            with self.path.open("r+b") as stream:
                stream.truncate(self.path.stat().st_size - len(torn))
        self._count = len(lines)
        return [json.loads(line) for line in lines]

    def write(self, entries: Sequence[list[Any]]) -> None:
        """Append those of a director's entries that are new.

        Raises:
            DiskFull: no space.
        """
        fresh = entries[self._count :]
        if not fresh:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("ab", buffering=0) as stream:
                stream.write("".join(json.dumps(entry, allow_nan=False) + "\n" for entry in fresh).encode())
                os.fsync(stream.fileno())
        except OSError as error:
            raise_if_full(error, self.path)
            raise
        self._count = len(entries)


@dataclass(slots=True)
class _Worker:
    """What is known of a worker: the members it was given that neither ended nor wait, and what it asks for."""

    members: set[str] = field(default_factory=set)
    asks: bool = False
    """It runs nothing, and waits for an answer."""
    free: bool = False
    """It had a free slot when it asked last, and was given nothing."""


class Hub:
    """Answers the questions of workers, by name, out of a director.

    A member that a dead worker held goes on from its last state on the shelf, in whichever worker asks next.
    """

    def __init__(self, director: Director, recorder: Recorder, journal: Journal, shelf: Shelf, log: Log):
        self._director = director
        self._recorder = recorder
        self._journal = journal
        self._shelf = shelf
        self._log = log
        self._workers: dict[str, _Worker] = {}
        self._steps: dict[str, int] = {}
        """Steps of the states on the shelf that orders to go on mean."""
        self._returned: deque[Order] = deque()
        """Members that are to be taken up again."""
        self._early: dict[str, Order] = {}
        """Orders for members whose workers have not written them down yet."""
        self._said: set[str] = set()
        self.stopping = False
        """Nothing is handed out any more."""
        self.over = False
        """Nothing runs, and nothing is left to begin or to go on with."""
        self.progress = 0
        """Reports and endings so far: a sweep gets on whose workers die in between."""

    @property
    def idle(self) -> bool:
        """Whether no worker holds a member."""
        return not any(worker.members for worker in self._workers.values())

    def resume(self) -> None:
        """Take up a sweep whose driver died: the director's journal, and every member that was under way."""
        self._director.restore({"journal": self._journal.read()})
        self._take_back(self._director.under_way(), None)

    def join(self, worker: str) -> None:
        """A worker is there, and may ask."""
        self._workers[worker] = _Worker()

    def lose(self, worker: str) -> list[str]:
        """A worker is gone: the members that it held, which others go on with."""
        lost = sorted(self._workers.pop(worker).members)
        self._take_back(lost, [worker])
        return lost

    def leave(self, worker: str) -> None:
        """A worker has come to its end."""
        self._workers.pop(worker)

    def take(self, worker: str, what: str, *told: Any) -> Answer | None:
        """One thing that a worker says; an answer where it asks, unless it has to wait for it (see `poll`)."""
        match what:
            case "event":
                name, fields = told
                self._recorder.event(name, **fields, worker=worker)
                if name == "waiting":
                    self._has_parked(worker, fields["member"], fields["step"])
            case "note":
                if told[0] not in self._said:  # what one worker finds, all do
                    self._said.add(told[0])
                    self._recorder.note(told[0])
            case "next":
                return self._next(worker, *told)
            case "judge":
                return Answer(self._judge(*told))
            case "started":
                self._director.started(*told)
            case "ended":
                self._ended(worker, *told)
            case "failed":
                self._workers[worker].members.discard(told[0])
                going_on = self._director.failed(*told)
                self._write()
                self.progress += 1
                return Answer(going_on)
            case "flush":
                self._write()
                return Answer(None)
        return None

    def poll(self, worker: str) -> Answer | None:
        """The answer that a worker with nothing to do waits for, once there is one."""
        return self._next(worker, True, True) if self._workers[worker].asks else None

    # -- within --------------------------------------------------------------------------------------------------------

    def _next(self, worker: str, free: bool, idle: bool) -> Answer | None:
        own = self._workers[worker]
        own.asks, own.free = False, False
        handout = None if self.stopping else self._hand_out(worker, free, idle)
        if handout is not None:
            own.members.add(handout.order.member)
            return Answer(handout)
        own.free = free
        if idle and not self.stopping and not self.over:
            own.asks = True
            return None
        return Answer(None)

    def _hand_out(self, worker: str, free: bool, idle: bool) -> Handout | None:
        # With members to spread, a worker that has fewer comes first; one without any always gets its turn.
        held = len(self._workers[worker].members)
        free = free and not any(other.free and len(other.members) < held for other in self._workers.values())
        for order in self._returned:
            if free or order.action == "dismiss":
                self._returned.remove(order)
                return self._handout(order)
        while (order := self._director.next(free=free, idle=idle)) is not None:
            self._write()
            if self._is_behind(order.member):
                self._early[order.member] = order
                continue
            return self._handout(order)
        self._write()
        self.over = free and idle and self.idle
        return None

    def _handout(self, order: Order) -> Handout:
        return Handout(order, self._director.config(order.member), self._steps.get(order.member))

    def _is_behind(self, member: str) -> bool:
        """Whether a member that the director lets go on or stops has yet to come where it waits, or to be put there."""
        held = any(member in worker.members for worker in self._workers.values())
        return held or any(order.member == member for order in self._returned)

    def _judge(self, reports: Sequence[Report]) -> dict[str, Verdict]:
        verdicts = self._director.judge(reports)
        for report in reports:
            if report.level == self._director.members[report.member].level:
                self._early.pop(report.member, None)  # it reported again, and has its verdict at once
        self._write()
        self.progress += len(reports)
        return verdicts

    def _ended(self, worker: str, ending: Ending) -> None:
        self._workers[worker].members.discard(ending.member)
        self._director.ended(ending)
        self._write()
        self._shelf.drop(ending.member)
        self._steps.pop(ending.member, None)
        self.progress += 1

    def _has_parked(self, worker: str, member: str, step: int) -> None:
        self._workers[worker].members.discard(member)
        self._steps[member] = step
        early = self._early.pop(member, None)
        if early is not None:
            self._returned.append(early)

    def _take_back(self, members: Sequence[str], workers: Sequence[str] | None) -> None:
        """Members that no worker holds any more go on from their last states, or begin again."""
        back: dict[str, int] = {}
        for name in members:
            state = self._shelf.rescue(name, workers)
            back[name] = -1 if state is None else state.step
            order = self._order_for(name, state)
            if state is not None:
                self._steps[name] = state.step
            if order is not None:
                self._returned.append(order)
        if back:
            self._log.drop_after(back)

    def _order_for(self, name: str, state: State | None) -> Order | None:
        """What is to be done with a member that was under way, None: it waits for its verdict as before."""
        if state is None:
            return Order("start", name)
        known = self._director.members[name]
        if state.level - 1 >= known.level >= 0:
            if known.state == "waiting":
                return None
            if known.verdict is not None and known.verdict.judgement == "stop":
                return Order("dismiss", name, known.verdict.reason)
        return Order("continue", name)

    def _write(self) -> None:
        self._journal.write(self._director.journal)
