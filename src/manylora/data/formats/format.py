"""What a format is: how one row becomes sequences that the tokenizer encodes, and which tokens of them are targets.

A format turns a row into `Shown`: the texts that the tokenizer must encode, and how their tokens are put together.
So all rows are encoded in a few large calls, whatever the format.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from manylora.data.faults import RowFault
from manylora.data.tokens import Marked, TokenRules

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedTokenizerBase

    from manylora.data.rows import Row

Overflow = Literal["error", "split", "right"]

Kind = Literal["sequence", "preference", "unpaired", "label", "tags"]
"""What a row's target is: the tokens of one sequence; a chosen and a rejected one; a sequence and whether it is good;
a class of the whole text; a class of each word. A task learns from some kinds."""


@dataclass(frozen=True, slots=True)
class Shown:
    """One sequence of a row before it has tokens.

    `mark` takes the tokens of each of `texts`; `notes` are what the log should count. `prompt` and `reference` are text
    for people and for scoring; sequences with the same `group` stay on one side of a split. `label` is the class of the
    whole sequence; `variant` says which of a row's sequences this is ("chosen", "rejected"; "" where there is one).
    """

    texts: tuple[str, ...]
    mark: Callable[[Sequence[list[int]]], Marked]
    prompt: str
    reference: str
    group: str
    notes: tuple[str, ...] = ()
    label: str | None = None
    variant: str = ""


class Format(Protocol):
    """How rows with certain columns are shown. Stateless; faults of a row are raised as `RowFault`."""

    name: str
    kind: Kind
    columns: tuple[str, ...]
    """The columns that a row must have."""
    also: tuple[tuple[str, ...], ...]
    """Other sets of columns, any of which a row may have instead."""
    optional: tuple[str, ...]
    """Further columns that it reads where they are there."""
    overflows: tuple[Overflow, ...]
    """What may be done with a row that is too long; the first is the default."""

    def fits(self, row: Row) -> bool:
        """Whether the row has what the format needs, by its columns and the kinds of value in them."""
        ...

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        """The row's sequences: one; a chosen and a rejected one; or one for each of several targets.

        Raises:
            RowFault: what is wrong with the row.
        """
        ...


def has_columns(row: Row, *sets: tuple[str, ...]) -> bool:
    """Whether the row has one of several sets of columns."""
    return any(all(column in row.values for column in columns) for columns in sets)


def text_of(row: Row, column: str, *, may_be_empty: bool = False) -> str:
    """A column's text.

    Raises:
        RowFault: it is no text, or empty where it may not be.
    """
    return checked_text(row.values.get(column), column, may_be_empty=may_be_empty)


def checked_text(value: Any, name: str, *, may_be_empty: bool = False) -> str:
    """A value that is text; `name` is the column, or the place in it, as the message should call it.

    Raises:
        RowFault: it is no text, or empty where it may not be.
    """
    if not isinstance(value, str):
        raise RowFault(f"{name} no text", f"{name} is {value!r:.60}, not text", allowed="a string")
    if not may_be_empty and not value.strip():
        raise RowFault(f"{name} empty", f"{name} is empty", next_step="fill it, or leave the row out")
    return value


def optional_text(row: Row, column: str) -> str:
    """A column's text; "" where the column is missing, null or blank.

    Raises:
        RowFault: it is something else than text.
    """
    value = row.values.get(column)
    text = "" if value is None else checked_text(value, column, may_be_empty=True)
    return text if text.strip() else ""


TRUTH = {"true": True, "false": False, "1": True, "0": False}


def is_truth(value: Any) -> bool:
    """Whether a value is a yes or no, as `truth_of` reads it."""
    if isinstance(value, str):
        return value.strip().lower() in TRUTH
    return isinstance(value, (bool, int, float)) and value in (0, 1)


def truth_of(value: Any, name: str) -> bool:
    """A yes or no: true, false, 0 or 1, or one of these as text (a CSV file holds nothing else).

    Raises:
        RowFault: it is something else.
    """
    if is_truth(value):
        return TRUTH[value.strip().lower()] if isinstance(value, str) else bool(value)
    raise RowFault(f"{name} no boolean", f"{name} is {value!r:.60}, not true or false", allowed="true, false, 1, 0")


def shown_completion(prompt: str, completion: str, rules: TokenRules) -> Shown:
    """A prompt and what should follow it, encoded apart and joined; the completion and an end token are targets."""
    touching = bool(prompt) and not prompt[-1].isspace() and not completion[0].isspace()
    notes = ("no white space between prompt and completion: they are joined as they are",) if touching else ()
    mark = partial(_mark_completion, rules=rules)
    return Shown((prompt, completion), mark, prompt=prompt, reference=completion, group=prompt, notes=notes)


def _mark_completion(encoded: Sequence[list[int]], *, rules: TokenRules) -> Marked:
    prompt, completion = encoded
    if rules.front and completion[:1] == rules.front:
        raise RowFault(
            "doubled BOS", f"completion begins with {rules.name(completion[0])}, which belongs before the prompt"
        )
    before = fronted(prompt, rules)
    tokens = [*before, *completion, *end_of(completion, rules)]
    return Marked(tokens, [(len(before), len(tokens))])


def fronted(tokens: list[int], rules: TokenRules) -> list[int]:
    """The tokens of a bare text after the BOS that the tokenizer puts before each text, if it does.

    Raises:
        RowFault: the text brings a BOS of its own, so it would come twice.
    """
    if rules.front and tokens[:1] == rules.front:
        raise RowFault(
            "doubled BOS",
            f"the text begins with {rules.name(tokens[0])}, which the tokenizer puts there itself: it would come twice",
            next_step="take it out of the data",
        )
    return [*rules.front, *tokens]


def end_of(tokens: list[int], rules: TokenRules) -> list[int]:
    """EOS, unless the data wrote it already."""
    return [] if tokens and tokens[-1] == rules.eos_id else [rules.eos_id]


@lru_cache(maxsize=4)
def around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """What the tokenizer itself puts before and after one text: BOS and nothing, or [CLS] and [SEP], or nothing.

    Raises:
        RowFault: it encodes the text itself in another way when it puts something around it.
    """
    text, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    for start in range(len(whole) - len(text) + 1):
        if whole[start : start + len(text)] == text:
            return whole[:start], whole[start + len(text) :]
    raise RowFault(
        "special tokens", "the tokenizer encodes a text in another way when it adds its special tokens to it"
    )


def surrounded(tokens: list[int], rules: TokenRules) -> list[int]:
    """The tokens of a whole text with what the tokenizer itself puts around it: what a classifier reads.

    Raises:
        RowFault: the text brings the tokenizer's first token itself, so it would come twice.
    """
    before, after = around(rules.tokenizer)
    if before and tokens[: len(before)] == before:
        raise RowFault(
            "doubled BOS",
            f"the text begins with {rules.name(tokens[0])}, which the tokenizer puts there itself: it would come twice",
            next_step="take it out of the data",
        )
    return [*before, *tokens, *after]
