"""What a person sees while a sweep goes on: the ten best trials and one line of progress, all of it on stderr."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TextIO

from manylora.runs.console import LINES_PER_RUN, Progress, duration, is_terminal
from manylora.sweeps.leaderboard import Entry, State, cells, ended_lines, ranked, searched_keys, short_names, tally

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import RenderableType
    from rich.live import Live
    from rich.text import Text

TOP = 10
REDRAW_S = 0.4
"""Least time between two drawings of the table: one takes about 10 ms, which training then does not have."""
SILENCE_S = 30.0
"""Time after which a pipe gets a line of progress though no trial has ended."""
BAR_WIDTH = 24


class Board(Progress):
    """Progress of a sweep in trained tokens: `start`, then `members` after each step and `show` as entries change.

    A terminal gets a live table, a pipe a line for each trial that ends and now and then one of progress. Both calls
    are cheap enough for every step of a fleet: the table is drawn a few times a second at most.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        super().__init__(quiet=quiet, stream=stream, clock=clock)
        self._live: Live | None = None
        self._entries: Sequence[Entry] = ()
        self._states: dict[int, State] = {}
        self._resumed = False
        self._stage = self._facts = ""
        self._done = 0
        self._drawn_at = float("-inf")

    def note(self, text: str) -> None:
        """Print a line that stays, above the table where there is one."""
        if self._live is not None and not self._quiet:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            super().note(text)

    def start(self, total_steps: int, *, done: int = 0, every_steps: int | None = None) -> None:
        """Begin to count tokens: `total_steps` are expected, `done` were trained before (a resumed sweep)."""
        self._total, self._first, self._shown, self._done = total_steps, done, done, done
        self._every = every_steps or max(1, total_steps // LINES_PER_RUN)
        self._begun = self._shown_at = self._clock()
        self._resumed = done > 0
        if not self._quiet and is_terminal(self._stream):
            self._open_table()

    def members(self, done_tokens: int, total_tokens: int, running: int, tokens_per_s: float | None) -> None:
        """Show what all members have trained together, of how many tokens, and how many of them run now.

        `total_tokens` is what the sweep expects at present: it falls as trials are stopped.
        """
        if self._quiet:
            return
        self._done, self._total = done_tokens, total_tokens
        speed = f"  {tokens_per_s:,.0f} tokens/s" if tokens_per_s is not None else ""
        self._facts = f"{running} running{speed}"
        if self._live is not None:
            self._stage = ""
            self._redraw()
            return
        now = self._clock()
        moved = done_tokens - self._shown
        if moved > 0 and (moved >= self._every or now - self._shown_at >= SILENCE_S or done_tokens >= total_tokens):
            self._shown, self._shown_at = done_tokens, now
            self.note(f"trained {done_tokens:,} of {total_tokens:,} tokens  {self._facts}  {self._left()}".rstrip())

    def show(self, entries: Sequence[Entry]) -> None:
        """Show the trials as they stand; in a pipe, those that have ended since the last call."""
        if self._quiet:
            return
        self._entries = entries
        if self._live is not None:
            self._redraw()
            return
        if self._resumed:
            # a resumed sweep has told of these before
            self._resumed = False
            ended = sum(entry.ended for entry in entries)
            if ended:
                self.note(f"{ended} of {len(entries)} trials had ended before")
            self._states = {entry.trial: entry.state for entry in entries}
        for line in ended_lines(self._states, entries):
            self.note(line)
        self._states = {entry.trial: entry.state for entry in entries}

    def step(
        self, step: int, *, loss: float | None, learning_rate: float | None = None, tokens_per_s: float | None = None
    ) -> None:
        """Nothing: `members` counts what all members do, and one member's loss says little about them."""

    def stage(self, text: str) -> None:
        """Name what happens between two steps, such as an evaluation; says nothing in a pipe."""
        self._stage = text
        if self._live is not None:
            self._redraw()

    def close(self) -> None:
        """Draw the table a last time and leave it on the terminal; harmless when called again."""
        if self._live is not None:
            self._stage = ""
            self._live.update(self._table())
            self._live.stop()
            self._live = None

    def _open_table(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._live = Live(
            self._table(),
            console=Console(file=self._stream),
            auto_refresh=False,
            # results go to stdout while the table lives on stderr: it must not swallow them
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._live.start(refresh=True)

    def _redraw(self) -> None:
        now = self._clock()
        if self._live is not None and now - self._drawn_at >= REDRAW_S:
            self._drawn_at = now
            self._live.update(self._table(), refresh=True)

    def _table(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        order = ranked(self._entries)
        keys = searched_keys(order)
        table = Table(box=None, pad_edge=False, header_style="dim")
        for column, name in enumerate(["", "trial", "state", "tokens", "eval loss", *short_names(keys)]):
            numeric = column in (0, 1, 3)
            table.add_column(Text(name), justify="right" if numeric else "left", no_wrap=True, overflow="ellipsis")
        for place, entry in enumerate(order[:TOP], start=1):
            style = "bold" if place == 1 and entry.loss is not None else "dim" if entry.state == "stopped" else ""
            table.add_row(*(Text(cell) for cell in cells(place, entry, keys)), style=style)
        line = Table.grid(padding=(0, 2))
        line.add_row(
            ProgressBar(total=max(1, self._total), completed=self._done, width=BAR_WIDTH),
            _line(f"{self._done:,}/{self._total:,} tokens"),
            _line(self._stage or self._facts),
            _line(self._left(), "dim"),
        )
        return Group(*([table, _line(tally(order), "dim")] if order else []), line)

    def _left(self) -> str:
        trained, elapsed = self._done - self._first, self._clock() - self._begun
        if self._done >= self._total:
            return f"{duration(elapsed)} elapsed"
        return f"{duration(elapsed / trained * (self._total - self._done))} left" if trained > 0 else ""


def _line(text: str, style: str = "") -> Text:
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
