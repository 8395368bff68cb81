"""The words of a sentence and a class for each: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

from manylora.data.faults import RowFault
from manylora.data.formats.format import Kind, Overflow, Shown, around, surrounded
from manylora.data.formats.label import class_name
from manylora.data.tokens import Marked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from manylora.data.rows import Row
    from manylora.data.tokens import TokenRules

TAGS = ("tags", "ner_tags", "pos_tags", "labels")
IGNORED = -100
"""The tag of a word that has no class, by the custom of PyTorch's losses."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words and their classes: the class of a word is learned at its first token.

    Each word is encoded apart, so that its first token is known; all but the first after a space, where the tokenizer
    does not put that space itself, so that the tokens are those of the sentence. A word tagged -100 has no class.
    """

    name: str = "tagged"
    kind: Kind = "tags"
    columns: tuple[str, ...] = ("tokens", "tags")
    also: tuple[tuple[str, ...], ...] = tuple(("tokens", tags) for tags in TAGS[1:])
    optional: tuple[str, ...] = TAGS[1:]
    overflows: tuple[Overflow, ...] = ("error", "right")

    def fits(self, row: Row) -> bool:
        lists = {column for column, value in row.values.items() if isinstance(value, (list, tuple))}
        return "tokens" in lists and any(column in lists for column in TAGS)

    def show(self, row: Row, rules: TokenRules) -> tuple[Shown, ...]:
        column = _tags_column(row)
        words = _words(_filled(row, "tokens"))
        tags = [_tag(tag, column) for tag in _filled(row, column)]
        if len(words) != len(tags):
            raise RowFault(
                "unequal lengths",
                f"there are {len(words)} tokens and {len(tags)} {column}",
                allowed="one tag for each word",
            )
        space = " " if _takes_space(rules.tokenizer) else ""
        texts = (words[0], *(f"{space}{word}" for word in words[1:]))
        mark = partial(_mark, words=tuple(words), tags=tuple(tags), rules=rules)
        sentence = " ".join(words)
        reference = " ".join("-" if tag is None else tag for tag in tags)
        return (Shown(texts, mark, prompt=sentence, reference=reference, group=sentence),)


def _tags_column(row: Row) -> str:
    found = [column for column in TAGS if isinstance(row.values.get(column), (list, tuple))]
    if "tags" in row.values or not found:
        return "tags"
    if len(found) > 1:
        raise RowFault(
            "several tags",
            f"{' and '.join(found)} are all lists that may be the tags",
            next_step=f"say which: data.columns: {{tags: {found[0]}}}",
        )
    return found[0]


def _filled(row: Row, column: str) -> Sequence[Any]:
    value: Any = row.values.get(column)
    if not isinstance(value, (list, tuple)) or not value:
        raise RowFault(f"{column} no list", f"{column} is {value!r:.60}", allowed="a list, not empty")
    return value


def _words(values: Sequence[Any]) -> list[str]:
    for number, word in enumerate(values, 1):
        if not isinstance(word, str) or not word.strip():
            raise RowFault("no word", f"tokens: word {number} is {word!r:.60}", allowed="texts, none empty")
    return list(values)


def _tag(value: Any, column: str) -> str | None:
    return None if value == IGNORED and isinstance(value, int) else class_name(value, column)


def _mark(
    encoded: Sequence[list[int]], *, words: Sequence[str], tags: Sequence[str | None], rules: TokenRules
) -> Marked:
    firsts, tokens = [], []
    for part, word in zip(encoded, words, strict=True):
        if not part:
            raise RowFault(
                "word without token",
                f"the tokenizer makes no token of the word {word!a}",
                next_step="take the word and its tag out of the row",
            )
        firsts.append(len(tokens))
        tokens += part
    shift = len(around(rules.tokenizer)[0])
    targets = [(first + shift, tag) for first, tag in zip(firsts, tags, strict=True) if tag is not None]
    # A span for each tag, although neighbours touch: what is cut off must take its tag along.
    return Marked(
        surrounded(tokens, rules), [(place, place + 1) for place, _ in targets], tuple(tag for _, tag in targets)
    )


@lru_cache(maxsize=4)
def _takes_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a word inside a text is encoded as the word after a space, or as the word alone.

    Raises:
        RowFault: as neither of the two, so that words cannot be told apart.
    """
    text, first, spaced, alone = (tokenizer.encode(one, add_special_tokens=False) for one in ("a b", "a", " b", "b"))
    if text == [*first, *alone]:
        return False
    if text == [*first, *spaced]:
        return True
    raise RowFault(
        "words not apart",
        "the tokenizer does not encode a text word by word, so the first token of a word is not known",
        next_step="use a base with another tokenizer",
    )


TAGGED = Tagged()
