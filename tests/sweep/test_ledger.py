"""A resumed sweep's pace is that of this process: what was trained before it began is no part of it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from manylora.config import load_config
from manylora.runs.events import EventLog
from manylora.sweeps.board import Board
from manylora.sweeps.director import Director
from manylora.sweeps.ledger import Ledger
from manylora.sweeps.search import Search
from manylora.sweeps.space import parse_space
from manylora.sweeps.stopping import RULES, StopSettings
from manylora.sweeps.trials import Trials

FULL = 1000


class Trackers:
    def event(self, name: str, fields: dict[str, Any]) -> None:
        pass


def sweep(folder: Path, stream: io.StringIO, clock: Any) -> tuple[Director, Ledger]:
    """A sweep of two trials without stopping; members train 1,000 tokens."""
    values = {"base": "b", "data": {"train": "t", "eval": "e"}, "output": "o",
              "sweep": {"space": {"train.learning_rate": [1e-3, 1e-2]}, "search": "grid", "stop": "none"}}  # fmt: skip
    config = load_config(values)
    assert config.sweep is not None
    space = parse_space(config.sweep.space)
    search = Search("grid", space, seed=0, num_trials=None, storage=None, study_name="s")
    director = Director(Trials(config, space), search, RULES.get("none")(search.num_trials, StopSettings()))
    board = Board(stream=stream, clock=clock)
    return director, Ledger(config.sweep, folder, director, search, board, levels=(), full_tokens=FULL)


def step(ledger: Ledger, member: str, tick: int) -> None:
    ledger.event("step", member=member, step=tick, loss=1.0, tokens=50 * tick, tokens_per_s=80.0, tick=tick)


def test_a_resumed_sweep_counts_only_what_this_process_trains(tmp_path: Path) -> None:
    now = [0.0]
    director, ledger = sweep(tmp_path, io.StringIO(), lambda: now[0])
    with EventLog(tmp_path) as log:
        ledger.open(log, Trackers())  # pyright: ignore[reportArgumentType]
        names = []
        for _ in range(2):
            order = director.next(free=True, idle=True)
            assert order is not None
            names.append(order.member)
            director.started(order.member, FULL)
        for tick in range(1, 9):
            for name in names:
                step(ledger, name, tick)
    assert ledger.trained_tokens == 2 * 400

    told = io.StringIO()
    again, resumed = sweep(tmp_path, told, lambda: now[0])
    with EventLog(tmp_path) as log:
        resumed.open(log, Trackers())  # pyright: ignore[reportArgumentType]
        assert resumed.trained_tokens == 0
        again.restore(director.state())
        for tick in range(9, 13):
            for name in names:
                step(resumed, name, tick)
            now[0] += 10.0
    assert resumed.trained_tokens == 2 * 200
    # 300 tokens of 1,100 in 30 s before the last tick, whose second member is not counted yet
    assert told.getvalue().splitlines()[-1].split("  ")[0] == "trained 1,150 of 2,000 tokens"
    assert told.getvalue().splitlines()[-1].endswith("1m 13s left")
