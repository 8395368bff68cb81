from __future__ import annotations

import io
import subprocess
import sys

import pytest

from manylora.runs.console import Progress, duration, is_terminal


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
    monkeypatch.setenv("COLUMNS", "100")
    return Terminal()


def train(progress: Progress, clock: Clock, steps: range, seconds: float) -> None:
    for step in steps:
        clock.now += seconds
        progress.step(step, loss=1.0 / step, learning_rate=2e-4, tokens_per_s=4321.0)


def test_a_pipe_gets_plain_lines_a_few_times_a_run_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    with Progress(stream=stream, clock=clock) as progress:
        progress.note("device: cpu, because no accelerator is here")
        progress.start(50, every_steps=20)
        train(progress, clock, range(1, 51), 0.1)
    assert stream.getvalue().splitlines() == [
        "device: cpu, because no accelerator is here",
        "step 20/50  loss 0.0500  rate 2.00e-04  4,321 tokens/s  3s left",
        "step 40/50  loss 0.0250  rate 2.00e-04  4,321 tokens/s  1s left",
        "step 50/50  loss 0.0200  rate 2.00e-04  4,321 tokens/s  5s elapsed",
    ]


def test_quick_steps_print_about_twenty_lines_and_slow_ones_break_the_silence():
    quick, clock = io.StringIO(), Clock()
    progress = Progress(stream=quick, clock=clock)
    progress.start(1000)
    train(progress, clock, range(1, 1001), 0.001)
    assert len(quick.getvalue().splitlines()) == 20
    slow = io.StringIO()
    progress = Progress(stream=slow, clock=clock)
    progress.start(1000)
    train(progress, clock, range(1, 11), 6.0)
    assert [line.split("/")[0] for line in slow.getvalue().splitlines()] == [
        f"step {step:>4}" for step in (2, 4, 6, 8, 10)
    ]


def test_a_resumed_run_counts_from_where_it_was_and_estimates_from_its_own_steps():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(stream=stream, clock=clock)
    progress.start(100, done=90, every_steps=5)
    train(progress, clock, range(91, 96), 2.0)
    assert "step  95/100" in stream.getvalue()
    assert "10s left" in stream.getvalue()


def test_quiet_shows_nothing(terminal):
    progress = Progress(quiet=True, stream=terminal)
    progress.note("x")
    progress.start(1)
    progress.stage("evaluating")
    progress.step(1, loss=1.0)
    progress.close()
    assert terminal.getvalue() == ""


def test_a_terminal_gets_a_bar_with_notes_above_it_and_its_cursor_back(terminal):
    with Progress(stream=terminal) as progress:
        progress.start(3)
        progress.step(1, loss=0.5, learning_rate=1e-3, tokens_per_s=10.0)
        progress.note("[a] sites: 28 of 28 [/b]")
        progress.stage("evaluating")
        progress.step(3, loss=0.25)
    seen = terminal.getvalue()
    assert "3/3" in seen
    assert "loss 0.2500" in seen
    assert "[a] sites: 28 of 28 [/b]" in seen
    assert seen.rindex("\x1b[?25h") > seen.rindex("\x1b[?25l")
    progress.close()
    progress.note("after")
    assert terminal.getvalue().endswith("after\n")


def test_a_dumb_terminal_gets_plain_lines(terminal, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert not is_terminal(terminal)


def test_progress_goes_to_stderr_and_rich_is_not_imported_for_a_pipe():
    program = (
        "import sys\n"
        "from manylora.runs.console import Progress\n"
        "with Progress() as progress:\n"
        "    progress.note('why')\n"
        "    progress.start(1)\n"
        "    progress.step(1, loss=None)\n"
        "print('result', 'rich' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "result False\n"
    assert done.stderr.startswith("why\nstep 1/1")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (185, "3m 05s"), (7625, "2h 07m")]
)
def test_durations_read_at_a_glance(seconds, text):
    assert duration(seconds) == text
