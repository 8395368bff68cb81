"""A text and its class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from manylora.data.faults import RowFault
from manylora.data.formats.format import Kind, Overflow, Shown, around, surrounded, text_of
from manylora.data.tokens import Marked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from manylora.data.rows import Row
    from manylora.data.tokens import TokenRules


@dataclass(frozen=True, slots=True)
class Label:
    """A text and its class, which is what is learned: no token is a target.

    The text stands between what the tokenizer itself puts around a text. A second text, text_pair, follows it as the
    tokenizer joins two texts.
    """

    name: str = "label"
    kind: Kind = "label"
    columns: tuple[str, ...] = ("text", "label")
    also: tuple[tuple[str, ...], ...] = ()
    optional: tuple[str, ...] = ("text_pair",)
    overflows: tuple[Overflow, ...] = ("error", "right")

    def fits(self, row: Row) -> bool:
        return "text" in row.values and "label" in row.values

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        text, label = text_of(row, "text"), class_name(row.values["label"], "label")
        texts = (text,)
        if row.values.get("text_pair") is not None:
            second = text_of(row, "text_pair")
            between(rules.tokenizer)  # refused before anything is encoded
            texts = (text, second)
        whole = "\n".join(texts)
        mark = partial(_mark, rules=rules)
        return (Shown(texts, mark, prompt=whole, reference=label, group=whole, label=label),)


def class_name(value: Any, column: str) -> str:
    """A class as text: text itself, a whole number, true or false.

    Raises:
        RowFault: it is empty, a fraction, a list, or nothing.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    what = f"{column} is empty" if value == "" else f"{column} is {value!r:.60}, no class"
    raise RowFault(f"{column} no class", what, allowed="one class: text, or a whole number")


def _mark(encoded: Sequence[list[int]], *, rules: TokenRules) -> Marked:
    tokens = encoded[0] if len(encoded) == 1 else [*encoded[0], *between(rules.tokenizer), *encoded[1]]
    return Marked(surrounded(tokens, rules), [])


@lru_cache(maxsize=4)
def between(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer puts between two texts.

    Raises:
        RowFault: nothing that separates them, or it tells them apart by token types, which an example does not hold.
    """
    refused = "text_pair without separator", "text_pair is filled, but the tokenizer of this base "
    put = "put both texts into the column text, with words between them that tell them apart"
    before, after = around(tokenizer)
    first, second = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b"))
    pair = tokenizer("a", "b")
    if any(pair.get("token_type_ids", ())):
        raise RowFault(
            refused[0],
            f"{refused[1]}tells two texts apart by token types, which are not supported yet",
            next_step=put,
        )
    tokens = list(pair["input_ids"])
    start, stop = len(before) + len(first), len(tokens) - len(after) - len(second)
    middle = tokens[start:stop]
    if not middle or middle == before or tokens != [*before, *first, *middle, *second, *after]:
        raise RowFault(refused[0], f"{refused[1]}puts nothing between two texts", next_step=put)
    return tuple(middle)


LABEL = Label()
