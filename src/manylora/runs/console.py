"""What a person sees while a run goes on: a progress bar on a terminal, plain lines in a pipe; all of it on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LINES_PER_RUN = 20
"""Plain lines that a run prints when its steps are quick; slow steps add one every `SILENCE_S`."""
SILENCE_S = 10.0


class Progress:
    """Progress of one run. Notes may come at any time; `start` opens the count of steps and `close` ends it.

    Standard output is left to results. `quiet` shows nothing at all.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._clock = clock
        self._bar: Bar | None = None
        self._task: TaskID | None = None
        self._total = self._first = self._shown = self._every = 0
        self._begun = self._shown_at = 0.0

    def note(self, text: str) -> None:
        """Print a line that stays: what was chosen and why, a warning, a result on the way."""
        if self._quiet:
            return
        if self._bar is not None:
            # soft_wrap: the terminal folds long lines, so copied text holds no made-up line ends
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def start(self, total_steps: int, *, done: int = 0, every_steps: int | None = None) -> None:
        """Begin to count; `done` steps were made before (a resumed run), `every_steps` apart stand the plain lines."""
        self._total, self._first, self._shown = total_steps, done, done
        self._every = every_steps or max(1, total_steps // LINES_PER_RUN)
        self._begun = self._shown_at = self._clock()
        if not self._quiet and is_terminal(self._stream):
            self._open_bar()

    def step(
        self, step: int, *, loss: float | None, learning_rate: float | None = None, tokens_per_s: float | None = None
    ) -> None:
        """Show that `step` steps are done, with their latest numbers; cheap enough for every step."""
        if self._quiet:
            return
        if self._bar is not None and self._task is not None:
            facts = _facts(loss, learning_rate, tokens_per_s)
            self._bar.update(self._task, completed=step, description="training", facts=facts, eta=self._eta(step))
            return
        now = self._clock()
        due = step - self._shown >= self._every or now - self._shown_at >= SILENCE_S or step == self._total
        if due and step > self._shown:
            self._shown, self._shown_at = step, now
            width = len(str(self._total))
            facts = _facts(loss, learning_rate, tokens_per_s)
            self.note(f"step {step:>{width}}/{self._total}  {facts}  {self._eta(step)}".rstrip())

    def stage(self, text: str) -> None:
        """Name on the bar what happens between two steps, such as an evaluation; says nothing in a pipe."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=text)

    def close(self) -> None:
        """End the bar and give the terminal back; harmless when called again. Notes still print."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = self._task = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            TextColumn("{task.fields[eta]}", style="dim", markup=False),
            console=Console(file=self._stream),
            # results go to stdout while the bar lives on stderr: it must not swallow them
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._task = self._bar.add_task("training", total=self._total, completed=self._first, facts="", eta="")
        self._bar.start()

    def _eta(self, step: int) -> str:
        made, elapsed = step - self._first, self._clock() - self._begun
        if made <= 0 or step >= self._total:
            return f"{duration(elapsed)} elapsed" if step >= self._total else ""
        return f"{duration(elapsed / made * (self._total - step))} left"


def is_terminal(stream: TextIO) -> bool:
    """Whether a person watches `stream` on a screen that can redraw a line."""
    from os import environ

    return stream.isatty() and environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """A length of time to read at a glance: 8s, 3m 05s, 2h 07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    return f"{whole // 3600}h {whole % 3600 // 60:02d}m"


def _facts(loss: float | None, learning_rate: float | None, tokens_per_s: float | None) -> str:
    parts = []
    if loss is not None:
        parts.append(f"loss {loss:.4f}")
    if learning_rate is not None:
        parts.append(f"rate {learning_rate:.2e}")
    if tokens_per_s is not None:
        parts.append(f"{tokens_per_s:,.0f} tokens/s")
    return "  ".join(parts)
