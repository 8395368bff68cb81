"""What a row of each format shows the model and what is learned of it; one object per format, one line in the table.

A format turns a row into `Shown`: the texts that the tokenizer must encode, and how their tokens are put together.
So all rows are encoded in a few large calls, whatever the format.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, Protocol

from manylora.data import chat
from manylora.data.faults import RowFault
from manylora.data.tokens import Marked, TokenRules
from manylora.errors import DataError
from manylora.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from manylora.data.readers import Row

Overflow = Literal["error", "split", "right"]

ALSO_CALLED = {
    "prompt": ("question", "instruction", "query", "input", "source"),
    "completion": ("answer", "response", "output", "reply", "target"),
    "text": ("content", "document", "sentence"),
    "messages": ("conversations", "conversation", "dialogue"),
}
"""Names that other data sets use for our columns; they are only proposed, never taken unasked."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A row before it has tokens. `mark` takes the tokens of each of `texts`; `notes` are what the log should count."""

    texts: tuple[str, ...]
    mark: Callable[[Sequence[list[int]]], Marked]
    prompt: str
    reference: str
    group: str
    notes: tuple[str, ...] = ()


class Format(Protocol):
    """How rows with certain columns are shown. Stateless; faults of a row are raised as `RowFault`."""

    name: str
    columns: tuple[str, ...]
    """The columns that a row must have."""
    overflows: tuple[Overflow, ...]
    """What may be done with a row that is too long; the first is the default."""

    def fits(self, row: Row) -> bool:
        """Whether the row has what the format needs, by its columns alone."""
        ...

    def show(self, row: Row, rules: TokenRules) -> Shown: ...


FORMATS: Table[Format] = Table(
    "data format",
    {
        "messages": "manylora.data.formats:MESSAGES",
        "prompt-completion": "manylora.data.formats:PROMPT_COMPLETION",
        "text": "manylora.data.formats:TEXT",
    },
)
"""In the order in which `detect` prefers them where rows fit several."""


def detect(rows: Sequence[Row]) -> str:
    """The name of the format that every row fits.

    Raises:
        DataError: a row fits none, or not the one that most rows fit; names row, columns and the nearest format.
    """
    if not rows:
        raise DataError("no rows, so no format can be found", next_step="give a data file that holds rows")
    fitting = {name: [FORMATS.get(name).fits(row) for row in rows] for name in FORMATS}
    best = max(FORMATS, key=lambda name: sum(fitting[name]))
    if all(fitting[best]):
        return best
    if not any(fitting[best]):
        best = _nearest_format(rows[0])
    row, failing = rows[fitting[best].index(False)], fitting[best].count(False)
    fault = misfit(row, FORMATS.get(best))
    raise DataError(
        f"{row.where}: {fault.what}{f' (the same in {failing} of {len(rows)} rows)' if failing > 1 else ''}",
        nearest=fault.nearest,
        allowed="; ".join(f"{name}: {', '.join(FORMATS.get(name).columns)}" for name in FORMATS),
        next_step=fault.next_step,
    )


def misfit(row: Row, wanted: Format) -> RowFault:
    """The fault of a row that lacks columns of a format."""
    lacking = [column for column in wanted.columns if column not in row.values]
    alike = {column: _likely(column, row) for column in lacking}
    renames = ", ".join(f"{column}: {alike[column] or 'YOUR_COLUMN'}" for column in lacking)
    return RowFault(
        "misfit",
        f"the columns {', '.join(row.values) or '(none)'} do not fit; the nearest format is {wanted.name}, "
        f"which lacks {', '.join(lacking)} here",
        nearest=[name for name in alike.values() if name],
        next_step=f"name your columns, data.columns: {{{renames}}}, or set data.format",
    )


def _likely(column: str, row: Row) -> str | None:
    """The column of a row that is most likely meant by ours: a usual name for it, or a mistyped one."""
    usual = next((name for name in ALSO_CALLED.get(column, ()) if name in row.values), None)
    return usual or next(iter(difflib.get_close_matches(column, list(row.values), n=1, cutoff=0.7)), None)


def _nearest_format(row: Row) -> str:
    """By columns of the same name, else by a list of objects (a conversation), by like names, by how many there are."""
    wanted = {name: FORMATS.get(name).columns for name in FORMATS}
    same = {name: sum(column in row.values for column in wanted[name]) for name in FORMATS}
    alike = {name: sum(bool(_likely(column, row)) for column in wanted[name]) for name in FORMATS}
    if any(same.values()):
        return max(FORMATS, key=same.__getitem__)
    if any(isinstance(value, list) and value and isinstance(value[0], dict) for value in row.values.values()):
        return "messages"
    if any(alike.values()):
        return max(FORMATS, key=alike.__getitem__)
    return "prompt-completion" if len(row.values) > 1 else "text"


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text: every token is learned but the first, which nothing comes before; EOS is appended."""

    name: str = "text"
    columns: tuple[str, ...] = ("text",)
    overflows: tuple[Overflow, ...] = ("split", "error", "right")

    def fits(self, row: Row) -> bool:
        return "text" in row.values

    def show(self, row: Row, rules: TokenRules) -> Shown:
        text = _string(row, "text")
        return Shown((text,), partial(_mark_text, rules=rules), prompt="", reference=text, group=text)


@dataclass(frozen=True, slots=True)
class PromptCompletion:
    """A prompt and what should follow it: two strings, encoded apart and joined, or two lists of messages."""

    name: str = "prompt-completion"
    columns: tuple[str, ...] = ("prompt", "completion")
    overflows: tuple[Overflow, ...] = ("error", "right")

    def fits(self, row: Row) -> bool:
        return "prompt" in row.values and "completion" in row.values

    def show(self, row: Row, rules: TokenRules) -> Shown:
        prompt, completion = row.values["prompt"], row.values["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            return _shown_chat([*prompt, *completion], rules, learned_from=len(prompt))
        if isinstance(prompt, list) or isinstance(completion, list):
            raise RowFault(
                "mixed",
                "one of prompt and completion is a list and the other is not",
                allowed="two strings, or two lists",
            )
        prompt = _string(row, "prompt", may_be_empty=rules.front_bos is not None)
        completion = _string(row, "completion")
        touching = bool(prompt) and not prompt[-1].isspace() and not completion[0].isspace()
        notes = ("no white space between prompt and completion: they are joined as they are",) if touching else ()
        mark = partial(_mark_completion, rules=rules)
        return Shown((prompt, completion), mark, prompt=prompt, reference=completion, group=prompt, notes=notes)


@dataclass(frozen=True, slots=True)
class Messages:
    """A conversation: every assistant turn is learned."""

    name: str = "messages"
    columns: tuple[str, ...] = ("messages",)
    overflows: tuple[Overflow, ...] = ("error", "right")

    def fits(self, row: Row) -> bool:
        return "messages" in row.values

    def show(self, row: Row, rules: TokenRules) -> Shown:
        return _shown_chat(row.values["messages"], rules, learned_from=0)


TEXT, PROMPT_COMPLETION, MESSAGES = Text(), PromptCompletion(), Messages()


def _shown_chat(messages: object, rules: TokenRules, *, learned_from: int) -> Shown:
    conversation, notes = chat.render(messages, rules, learned_from=learned_from)
    first = conversation.turns[0]
    reference = str(conversation.messages[first.index]["content"])
    return Shown(conversation.texts, conversation.mark, first.before, reference, group=first.before, notes=notes)


def _string(row: Row, column: str, *, may_be_empty: bool = False) -> str:
    value = row.values[column]
    if not isinstance(value, str):
        raise RowFault(f"{column} no text", f"{column} is {value!r:.60}, not text", allowed="a string")
    if not may_be_empty and not value.strip():
        raise RowFault(f"{column} empty", f"{column} is empty", next_step="fill it, or leave the row out")
    return value


def _mark_text(encoded: Sequence[list[int]], *, rules: TokenRules) -> Marked:
    tokens = [*_fronted(encoded[0], rules), *_end(encoded[0], rules)]
    return Marked(tokens, [False] + [True] * (len(tokens) - 1))


def _mark_completion(encoded: Sequence[list[int]], *, rules: TokenRules) -> Marked:
    prompt, completion = encoded
    if completion[:1] == rules.front and rules.front:
        raise RowFault(
            "doubled BOS", f"completion begins with {rules.name(completion[0])}, which belongs before the prompt"
        )
    before = _fronted(prompt, rules)
    after = [*completion, *_end(completion, rules)]
    return Marked(before + after, [False] * len(before) + [True] * len(after))


def _fronted(tokens: list[int], rules: TokenRules) -> list[int]:
    if rules.front and tokens[:1] == rules.front:
        raise RowFault(
            "doubled BOS",
            f"the text begins with {rules.name(tokens[0])}, which the tokenizer puts there itself: it would come twice",
            next_step="take it out of the data",
        )
    return [*rules.front, *tokens]


def _end(tokens: list[int], rules: TokenRules) -> list[int]:
    """EOS, unless the data wrote it already."""
    return [] if tokens and tokens[-1] == rules.eos_id else [rules.eos_id]
