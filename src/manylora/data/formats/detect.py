"""Which format rows are in, told by their columns; and what is wrong with a row that fits none."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

from manylora.data.faults import RowFault
from manylora.data.formats import FORMATS
from manylora.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from manylora.data.formats.format import Format
    from manylora.data.rows import Row

ALSO_CALLED = {
    "prompt": ("question", "instruction", "query", "input", "source"),
    "completion": ("answer", "answers", "response", "output", "reply", "target"),
    "text": ("content", "document", "sentence", "review", "premise"),
    "text_pair": ("hypothesis", "sentence2"),
    "messages": ("dialogue", "dialog", "chat", "turns"),
    "conversations": ("dialogue", "dialog", "chat", "turns"),
    "instruction": ("question", "query", "task"),
    "output": ("response", "answer", "completion"),
    "chosen": ("preferred", "accepted", "response_chosen", "chosen_response", "better"),
    "rejected": ("dispreferred", "response_rejected", "rejected_answer", "worse"),
    "label": ("category", "class", "intent", "sentiment", "topic", "labels"),
    "source": ("src", "document", "article", "dialogue"),
    "target": ("tgt", "summary", "abstract", "highlights"),
    "tokens": ("words",),
    "tags": ("ner", "upos", "chunk_tags"),
    "segments": ("input_output",),
}
"""Names that other data sets use for our columns; they are only proposed, never taken unasked."""

LIKE = 0.75
"""How alike a mistyped column is to ours: `completoin` is, `context` is no mistyped `text`."""


def detect(rows: Sequence[Row], *, kinds: Collection[str] | None = None, strict: bool = True) -> str:
    """The name of the format that every row fits, among those of certain kinds; not `strict`: that most rows fit.

    Rows that could not be read are left out.

    Raises:
        DataError: a row fits none, or not the one that most rows fit; names row, columns and the nearest format. Or
            the rows are of another kind.
    """
    readable = [row for row in rows if row.fault is None]
    if not readable:
        why = f" can be read ({rows[0].where}: {rows[0].fault})" if rows else ""
        raise DataError(f"no rows{why}, so no format can be found", next_step="give a data file that holds rows")
    fitting = {name: [FORMATS.get(name).fits(row) for row in readable] for name in FORMATS}
    counts = {name: sum(fitting[name]) for name in FORMATS}
    allowed = [name for name in FORMATS if kinds is None or FORMATS.get(name).kind in kinds]
    best, overall = max(allowed, key=counts.__getitem__), max(FORMATS, key=counts.__getitem__)
    judged = [name for name in FORMATS if FORMATS.get(name).kind == "unpaired" and name not in allowed]
    for name in judged:
        if counts[best] and counts[name] == len(readable):
            raise _judged(name, best, readable)
    if counts[best] == len(readable) or (not strict and counts[best] and counts[best] >= counts[overall]):
        return best
    if not counts[best]:
        best = _nearest_format(readable[0], allowed)
    # Where only names are in the way, the names are the answer: text and category are text and label.
    if counts[overall] > counts[best] and not _renamed(readable[0], FORMATS.get(best)):
        raise _another_kind(overall, counts[overall], readable, allowed, kinds or ())
    row, failing = readable[fitting[best].index(False)], len(readable) - counts[best]
    fault = misfit(row, FORMATS.get(best))
    same = f" (the same in {failing} of {len(readable)} rows)" if failing > 1 else ""
    rest = f"; {counts[best]} of {len(readable)} rows are {best} rows" if counts[best] else ""
    raise DataError(
        f"{row.where}: {fault.what}{same}{rest}",
        nearest=fault.nearest,
        allowed=_takes(allowed),
        next_step=fault.next_step,
    )


def _judged(name: str, best: str, rows: Sequence[Row]) -> DataError:
    return DataError(
        f"{rows[0].where}: the rows are `{name}` rows: a column says which answers are good, and this task would learn "
        "the bad ones as well",
        next_step=f"leave the bad rows out, or set data.format: {best} to learn them all",
    )


def _another_kind(
    name: str, count: int, rows: Sequence[Row], allowed: Sequence[str], kinds: Collection[str]
) -> DataError:
    found = FORMATS.get(name)
    columns = next(names for names in _sets(found) if not _lacking(names, rows[0]) or names == _sets(found)[-1])
    share = "the rows" if count == len(rows) else f"{count} of {len(rows)} rows"
    return DataError(
        f"{rows[0].where}: {share} are `{name}` rows ({', '.join(columns)}), and this task learns from "
        f"{' or '.join(kinds)} rows",
        allowed=_takes(allowed),
        next_step="name the columns to learn in data.columns, or leave such rows out",
    )


def misfit(row: Row, wanted: Format) -> RowFault:
    """The fault of a row that lacks columns of a format, or holds values there that the format cannot read."""
    columns = max(_sets(wanted), key=lambda names: _share(names, row))
    lacking = _lacking(columns, row)
    if not lacking:
        values = ", ".join(f"{name} is {row.values[name]!r:.40}" for name in columns)
        return RowFault(
            "misfit",
            f"the row has the columns of the format {wanted.name}, but not its values: {values}",
            next_step="mend the row, or set data.format",
        )
    alike = {column: _likely(column, row) for column in lacking}
    renames = ", ".join(f"{column}: {alike[column] or 'YOUR_COLUMN'}" for column in lacking)
    return RowFault(
        "misfit",
        f"the columns {', '.join(row.values) or '(none)'} do not fit; the nearest format is {wanted.name}, "
        f"which lacks {', '.join(lacking)} here",
        nearest=[name for name in alike.values() if name],
        next_step=f"name your columns, data.columns: {{{renames}}}, or set data.format",
    )


def _sets(wanted: Format) -> tuple[tuple[str, ...], ...]:
    return (wanted.columns, *wanted.also)


def _lacking(columns: Sequence[str], row: Row) -> list[str]:
    return [column for column in columns if column not in row.values]


def _takes(names: Sequence[str]) -> str:
    return "; ".join(f"{name}: {', '.join(FORMATS.get(name).columns)}" for name in names)


def _likely(column: str, row: Row) -> str | None:
    """The column of a row that is most likely meant by ours: a usual name for it, or a mistyped one."""
    usual = next((name for name in ALSO_CALLED.get(column, ()) if name in row.values), None)
    return usual or next(iter(difflib.get_close_matches(column, list(row.values), n=1, cutoff=LIKE)), None)


def _share(columns: Sequence[str], row: Row) -> float:
    """How many of the columns the row has, by name or, which counts a little less, by a name that is likely meant."""
    return sum(1.0 if column in row.values else 0.9 * bool(_likely(column, row)) for column in columns) / len(columns)


def _renamed(row: Row, wanted: Format) -> bool:
    """Whether the row lacks columns of a format, but has others that are likely meant by them."""
    return any(
        bool(lacking := _lacking(columns, row)) and all(_likely(column, row) for column in lacking)
        for columns in _sets(wanted)
    )


def _nearest_format(row: Row, allowed: Sequence[str]) -> str:
    """By the share of its columns that the row has, by that name or one like it; else by a conversation in it."""
    shares = {name: max(_share(columns, row) for columns in _sets(FORMATS.get(name))) for name in allowed}
    best = max(allowed, key=shares.__getitem__)
    if shares[best] >= 0.5:
        return best
    for value in row.values.values():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            talk = "sharegpt" if "from" in value[0] else "messages"
            if talk in allowed:
                return talk
    if shares[best]:
        return best
    usual = "prompt-completion" if len(row.values) > 1 else "text"
    return usual if usual in allowed else allowed[0]
