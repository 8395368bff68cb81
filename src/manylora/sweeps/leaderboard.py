"""The leaderboard of a sweep: one entry a trial, best first, as a file for spreadsheets and as lines for a terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from manylora.config_text import dump_inline
from manylora.files import write_text_atomic
from manylora.pages.charts import short_number

if TYPE_CHECKING:
    from pathlib import Path

FILE_NAME = "leaderboard.csv"
State = Literal["running", "waiting", "done", "stopped", "retired"]
STATES: tuple[State, ...] = get_args(State)
ENDED: frozenset[State] = frozenset({"done", "stopped", "retired"})
"""States that a trial never leaves."""
NO_METRICS = frozenset({"loss", "tokens"})
"""What an evaluation returns beside its metrics: the loss has a column of its own, the tokens are held-out ones."""
WIDEST_CELL = 28
"""Characters of a cell in the terminal; the file holds all of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One trial as it stands: tokens are trained ones, `loss` is the mean of its members' selected eval losses.

    `member` names the best of `members`; `tokens` is what all of them have trained together, `full_tokens` what they
    would have, run to their end; `spread` is the standard deviation of their losses, None for a single member.
    """

    trial: int
    member: str
    state: State
    tokens: int
    full_tokens: int
    loss: float | None = None
    spread: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    values: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether nothing of this trial will run any more."""
        return self.state in ENDED

    def to_dict(self) -> dict[str, Any]:
        """The entry as JSON holds it; numbers that are not finite become None."""
        plain = asdict(self)
        plain["loss"], plain["spread"] = finite(self.loss), finite(self.spread)
        plain["metrics"] = {name: finite(value) for name, value in self.metrics.items()}
        plain["members"] = list(self.members)
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Entry:
        """The entry that `to_dict` wrote."""
        return cls(**{**plain, "members": tuple(plain.get("members", ()))})


def ranked(entries: Iterable[Entry]) -> list[Entry]:
    """The entries, lowest eval loss first; those without a finite one are last, and equal ones in order of trial."""

    def place(entry: Entry) -> tuple[bool, float, int]:
        loss = finite(entry.loss)
        return loss is None, loss or 0.0, entry.trial

    return sorted(entries, key=place)


def write_csv(entries: Iterable[Entry], path: str | Path) -> None:
    """Write the leaderboard, best first: a searched value stands as one line of YAML, an unknown number as nothing.

    Raises:
        DiskFull: no space.
    """
    order = ranked(entries)
    metrics, keys = metric_names(order), searched_keys(order)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["place", "trial", "member", "state", "tokens", "eval_loss", "spread", *metrics, *keys])
    for place, entry in enumerate(order, start=1):
        numbers = [finite(entry.loss), finite(entry.spread), *(finite(entry.metrics.get(name)) for name in metrics)]
        values = [dump_inline(entry.values[key]) if key in entry.values else "" for key in keys]
        writer.writerow([place, entry.trial, entry.member, entry.state, entry.tokens, *numbers, *values])
    write_text_atomic(path, text.getvalue())


def table_lines(entries: Iterable[Entry], top: int = 10) -> list[str]:
    """The `top` best trials as lines of equal columns, and one that counts the rest; plain text, no colours."""
    order = ranked(entries)
    keys = searched_keys(order)
    head = ["", "trial", "state", "tokens", "eval loss", *short_names(keys)]
    rows = [cells(place, entry, keys) for place, entry in enumerate(order[:top], start=1)]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    if len(order) > top:
        lines.append(f"{len(order) - top} more, {tally(order[top:])}")
    return lines


def cells(place: int, entry: Entry, keys: Sequence[str]) -> list[str]:
    """A row of the terminal's table: place, trial, state, tokens, eval loss with spread, and the searched values."""
    values = [short(entry.values[key]) if key in entry.values else "" for key in keys]
    row = [str(place), str(entry.trial), entry.state, f"{entry.tokens:,}", loss_text(entry), *values]
    return [cell if len(cell) <= WIDEST_CELL else f"{cell[: WIDEST_CELL - 3]}..." for cell in row]


def loss_text(entry: Entry) -> str:
    """The eval loss to read, with its standard deviation over members where there are several."""
    loss, spread = finite(entry.loss), finite(entry.spread)
    if loss is None:
        return "-"
    return f"{loss:.4f}" if spread is None else f"{loss:.4f} sd {spread:.4f}"


def tally(entries: Iterable[Entry]) -> str:
    """How many trials are in which state: `3 done, 1 running`."""
    states = [entry.state for entry in entries]
    return ", ".join(f"{states.count(state)} {state}" for state in STATES if state in states)


def ended_lines(before: Mapping[int, State], entries: Sequence[Entry]) -> Iterator[str]:
    """A line for each trial that has ended since `before`, trial to state, was taken."""
    order = ranked(entries)
    places = {entry.trial: place for place, entry in enumerate(order, start=1)}
    for entry in sorted(entries, key=lambda entry: entry.trial):
        if not entry.ended or before.get(entry.trial) == entry.state:
            continue
        facts = [f"trial {entry.trial} {entry.state}", f"{entry.tokens:,} tokens"]
        if finite(entry.loss) is not None:
            facts.append(f"eval loss {loss_text(entry)}, place {places[entry.trial]} of {len(order)}")
        facts.append(values_text(entry))
        reason = " ".join(entry.reason.split())
        yield "  ".join(fact for fact in [*facts, f"({reason})" if reason else ""] if fact)


def values_text(entry: Entry) -> str:
    """The searched values of a trial in one line: `rank 8, learning_rate 2e-4`."""
    names = short_names(list(entry.values))
    return ", ".join(f"{name} {short(value)}" for name, value in zip(names, entry.values.values(), strict=True))


def searched_keys(entries: Iterable[Entry]) -> list[str]:
    """Every key that any trial has a value for, in the order in which they first appear."""
    return list(dict.fromkeys(key for entry in entries for key in entry.values))


def metric_names(entries: Iterable[Entry]) -> list[str]:
    """Every metric that any trial has, perplexity first."""
    names = dict.fromkeys(name for entry in entries for name in entry.metrics if name not in NO_METRICS)
    return sorted(names, key=lambda name: name != "perplexity")


def short_names(keys: Sequence[str]) -> list[str]:
    """The keys without what stands before their last dot, where that tells them apart."""
    last = [key.rpartition(".")[2] for key in keys]
    return [name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)]


def short(value: Any) -> str:
    """A searched value to read at a glance: 2e-4 for 0.0002; all but decimal numbers as YAML."""
    return short_number(value) if isinstance(value, float) and math.isfinite(value) else dump_inline(value)


def finite(value: float | None) -> float | None:
    """The number, None where it is none or not finite."""
    return value if value is not None and math.isfinite(value) else None
