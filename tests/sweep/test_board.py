from __future__ import annotations

import io
import re

import pytest

from manylora.runs.console import Progress
from manylora.sweeps.board import TOP, Board
from manylora.sweeps.leaderboard import Entry


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def entry(trial: int, loss: float | None, state="running", **fields) -> Entry:
    name = f"trial-{trial:03d}"
    return Entry(**{"member": name, "tokens": 500, "full_tokens": 1000, "members": (name,), **fields,
                    "trial": trial, "state": state, "loss": loss})  # fmt: skip


def test_a_pipe_gets_a_line_when_a_trial_ends_and_progress_now_and_then():
    stream, clock = io.StringIO(), Clock()
    with Board(stream=stream, clock=clock) as board:
        board.note("random search of 2 trials")
        board.start(1000)
        board.show([entry(0, None), entry(1, None)])
        for done in range(10, 1001, 10):
            clock.now += 0.1
            board.members(done, 1000, 2, 4321.0)
            board.stage("evaluating")
            if done == 500:
                board.show([entry(0, 1.5, "stopped", reason="worse than the median"), entry(1, 1.0)])
                board.show([entry(0, 1.5, "stopped", reason="worse than the median"), entry(1, 1.0)])
    lines = stream.getvalue().splitlines()
    assert lines[0] == "random search of 2 trials"
    assert lines[1] == "trained 50 of 1,000 tokens  2 running  4,321 tokens/s  10s left"
    assert lines[-1] == "trained 1,000 of 1,000 tokens  2 running  4,321 tokens/s  10s elapsed"
    assert len(lines) == 1 + 20 + 1
    assert [line for line in lines if line.startswith("trial ")] == [
        "trial 0 stopped  500 tokens  eval loss 1.5000, place 2 of 2  (worse than the median)"
    ]


def test_a_slow_sweep_breaks_the_silence_in_a_pipe():
    stream, clock = io.StringIO(), Clock()
    board = Board(stream=stream, clock=clock)
    board.start(10_000_000)
    for step in range(1, 11):
        clock.now += 16.0
        board.members(step * 10, 10_000_000, 4, None)
    assert len(stream.getvalue().splitlines()) == 5


def test_the_end_is_told_in_a_pipe_though_little_was_trained_since_the_last_line():
    stream = io.StringIO()
    board = Board(stream=stream, clock=Clock())
    board.start(1000)
    for done in (990, 1000, 1000):
        board.members(done, 1000, 1, None)
    assert [line.split("  ")[0] for line in stream.getvalue().splitlines()] == [
        "trained 990 of 1,000 tokens",
        "trained 1,000 of 1,000 tokens",
    ]


def test_time_left_follows_the_tokens_that_are_still_expected_and_this_process_own_pace():
    stream, clock = io.StringIO(), Clock()
    board = Board(stream=stream, clock=clock)
    board.start(1000, done=400)
    clock.now = 10.0
    board.members(500, 700, 1, None)
    assert stream.getvalue().strip().endswith("20s left")


def test_a_resumed_sweep_does_not_tell_again_of_trials_that_had_ended():
    stream = io.StringIO()
    board = Board(stream=stream)
    board.start(1000, done=500)
    board.show([entry(0, 1.0, "done"), entry(1, None)])
    board.show([entry(0, 1.0, "done"), entry(1, 2.0, "done")])
    lines = stream.getvalue().splitlines()
    assert lines[0] == "1 of 2 trials had ended before"
    assert [line.split("  ")[0] for line in lines[1:]] == ["trial 1 done"]


def test_a_terminal_gets_the_ten_best_with_notes_above_and_its_cursor_back(terminal):
    clock = Clock()
    with Board(stream=terminal, clock=clock) as board:
        board.start(64_000)
        board.note("[a] chosen because [/b]")
        clock.now = 1.0
        entries = [
            entry(trial, 3.0 - trial / 64, values={"adapter.rank": 8, "a.name": "[red]x[/nothing]"})
            for trial in range(64)
        ]
        board.show(entries)
        clock.now = 2.0
        board.members(16_000, 64_000, 12, 999.0)
    seen = plain(terminal.getvalue())
    last = seen[seen.rindex("trial") :]
    assert "[a] chosen because [/b]" in seen
    assert "[red]x[/nothing]" in last
    shown = re.findall(r"^ *\d+ +(\d+) +running", last, flags=re.MULTILINE)
    assert shown == [str(trial) for trial in range(63, 63 - TOP, -1)]
    assert "64 running" in last
    assert "16,000/64,000 tokens" in last
    assert "12 running" in last
    assert "6s left" in last
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")
    board.close()
    board.note("after")
    assert terminal.getvalue().endswith("after\n")


def test_a_terminal_is_drawn_a_few_times_a_second_however_often_things_change(terminal):
    clock = Clock()
    board = Board(stream=terminal, clock=clock)
    board.start(10_000)
    before = terminal.getvalue().count("tokens")
    for step in range(1, 10_001):
        clock.now += 0.001
        board.members(step, 10_000, 4, 100.0)
        board.show([entry(0, 1.0)])
        board.stage("evaluating")
    drawn = terminal.getvalue().count("/10,000 tokens") - before
    board.close()
    assert 10 <= drawn <= 50


def test_the_table_that_stays_is_the_last_one_though_it_was_not_due(terminal):
    clock = Clock()
    with Board(stream=terminal, clock=clock) as board:
        board.start(100)
        board.members(50, 100, 1, None)
        board.members(100, 100, 0, None)
        board.stage("evaluating")
    last = plain(terminal.getvalue()).splitlines()
    assert "100/100 tokens" in "".join(last[-2:])
    assert "evaluating" not in "".join(last[-2:])


def test_quiet_shows_nothing(terminal):
    board = Board(quiet=True, stream=terminal)
    board.note("x")
    board.start(10)
    board.members(10, 10, 1, 1.0)
    board.show([entry(0, 1.0, "done")])
    board.stage("evaluating")
    board.step(1, loss=1.0)
    board.close()
    assert terminal.getvalue() == ""


def test_a_board_stands_wherever_a_progress_does_and_steps_of_single_members_say_nothing():
    stream = io.StringIO()
    board: Progress = Board(stream=stream)
    board.start(100)
    for step in range(1, 101):
        board.step(step, loss=1.0, learning_rate=1e-3, tokens_per_s=5.0)
    assert stream.getvalue() == ""
