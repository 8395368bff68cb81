"""What a sweep writes down while it goes on: events, curves, the live leaderboard, sweep.json and leaderboard.csv."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.files import write_json_atomic
from manylora.runs.events import read_events
from manylora.sweeps.leaderboard import FILE_NAME, Entry, write_csv

if TYPE_CHECKING:
    from manylora.config import SweepConfig
    from manylora.runs.events import EventLog
    from manylora.runs.trackers import Trackers
    from manylora.sweeps.board import Board
    from manylora.sweeps.director import Director
    from manylora.sweeps.search import Search

SWEEP_FILE = "sweep.json"
WRITE_S = 5.0
"""Least time between two writings of sweep.json and leaderboard.csv while the sweep goes on."""
TURNING = frozenset({"admitted", "continued", "waiting", "done", "retired", "failed", "eval"})
"""Events after which the leaderboard stands differently."""


class Ledger:
    """A recorder (`training.loop.Recorder`) for all members of a sweep; `open` it on a log before its first event."""

    def __init__(
        self,
        sweep: SweepConfig,
        run: Path,
        director: Director,
        search: Search,
        board: Board,
        *,
        levels: tuple[int, ...],
        full_tokens: int,
    ):
        self._sweep = sweep
        self._run = run
        self._director = director
        self._search = search
        self._board = board
        self._levels = levels
        self._full_tokens = full_tokens
        self._log: EventLog | None = None
        self._trackers: Trackers | None = None
        self._now: dict[str | None, tuple[int, float]] = {}
        self._speeds: dict[str | None, float] = {}
        self._written_at = 0.0
        self._started = False
        self._before: dict[str, int] = {}
        self._tokens_before = 0

    @property
    def trained_tokens(self) -> int:
        """What this process has trained: a resumed sweep began with what the log tells of the one before."""
        return self._tokens() - self._tokens_before if self._started else 0

    def open(self, log: EventLog, trackers: Trackers) -> Ledger:
        """Itself, from now on writing to a run's log and trackers."""
        self._log, self._trackers = log, trackers
        self._before = {
            event["member"]: event["tokens"] for event in read_events(self._run) if event["event"] == "step"
        }
        return self

    def headlines(self) -> list[str]:
        """What the sweep will do, for the log."""
        sweep, trials = self._sweep, self._director.num_trials
        members = sweep.repeats * (sweep.folds or 1)
        what = f"{trials} trials" + (f" of {members} members each" if members > 1 else "")
        over = f"by {sweep.search} search over {', '.join(sweep.space)}"
        lines = [f"sweep: {what} {over}; a member trains {self._full_tokens:,} tokens to its end"]
        if self._levels:
            at = ", ".join(f"{tokens:,}" for tokens in self._levels)
            lines.append(f"{sweep.stop.rule} judges trials at {at} trained tokens")
        return lines

    def event(self, name: str, **fields: Any) -> None:
        assert self._log is not None, "a ledger is opened before its first event"
        assert self._trackers is not None
        if not self._started:
            self._started = True
            self._look_back()
            self._board.start(self._expected(), done=self._tokens_before)
        self._log.write(name, **fields)
        if name in ("step", "eval"):
            self._director.seen(fields["member"], fields["tokens"], fields["loss"] if name == "eval" else None)
        self._trackers.event(name, fields)
        if name == "step":
            worker = fields.get("worker")  # ticks count in each
            tick, speed = self._now.get(worker, (fields["tick"], 0.0))
            if fields["tick"] != tick:  # the last one is whole
                self._speeds[worker], speed = speed, 0.0
                self._progress()
            self._now[worker] = fields["tick"], speed + fields["tokens_per_s"]
        elif name in TURNING:
            self._board.show(self._director.entries())
            if time.monotonic() - self._written_at > WRITE_S:
                self.write()

    def note(self, text: str) -> None:
        self._board.note(text)

    def stage(self, text: str) -> None:
        self._board.stage(text)

    def write(self, winner: Entry | None = None) -> dict[str, Any]:
        """Write sweep.json and leaderboard.csv as things stand, and give the former back."""
        entries = self._director.entries()
        told = {
            "search": self._sweep.search,
            "stop": self._sweep.stop.rule,
            "trials": self._director.num_trials,
            "seed": self._sweep.seed,
            "entries": [entry.to_dict() for entry in entries],
            "importances": self._search.importances(),
            "winner": None if winner is None else winner.to_dict(),
            "tokens": sum(entry.tokens for entry in entries),
            "full_tokens": sum(entry.full_tokens for entry in entries) + self._unbegun(),
            "levels": list(self._levels),
        }
        write_json_atomic(self._run / SWEEP_FILE, told)
        write_csv(entries, self._run / FILE_NAME)
        self._written_at = time.monotonic()
        return told

    def _look_back(self) -> None:
        """Know of members under way what they trained before: their source knows it of the last judgement alone."""
        for name, tokens in self._before.items():
            member = self._director.members.get(name)
            if member is not None and not member.ended:
                self._director.seen(name, tokens, None)
        self._tokens_before = self._tokens()

    def _tokens(self) -> int:
        return sum(entry.tokens for entry in self._director.entries())

    def _progress(self) -> None:
        running = sum(1 for member in self._director.members.values() if member.state == "running")
        speed = sum(self._speeds.values())
        self._board.members(self._tokens(), self._expected(), running, speed or None)

    def _expected(self) -> int:
        """Tokens that the sweep will train as things stand: it falls as trials are stopped."""
        begun = sum(entry.tokens if entry.ended else entry.full_tokens for entry in self._director.entries())
        return begun + self._unbegun()

    def _unbegun(self) -> int:
        """Tokens of the members that have not begun, at the length of the configuration without any searched value."""
        members = self._sweep.repeats * (self._sweep.folds or 1)
        waiting = sum(1 for member in self._director.members.values() if not member.full_tokens and not member.ended)
        return self._full_tokens * (waiting + members * (self._director.num_trials - len(self._director.trials)))


def tokens_saved(told: Mapping[str, Any]) -> float:
    """The share of the full search's tokens that stopping trials early has saved, from what sweep.json holds."""
    saved = sum(one["full_tokens"] - one["tokens"] for one in told["entries"] if one["state"] == "stopped")
    return saved / told["full_tokens"] if told["full_tokens"] else 0.0
